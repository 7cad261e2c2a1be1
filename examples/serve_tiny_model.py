"""Serve a model that nobody has heard of: make a tiny random Qwen3, compile what vLLM asks for, start vLLM from the bundle, ask it.

Needs the extra `vllm` and no network.  Everything lies in a temporary folder; the server compiles nothing, and says so at the end.
"""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

SIZES = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 512}
NEEDED = ("vllm", "openai", "transformers")
STARTS_WITHIN = 600  # seconds; a start takes about 30 on an idle machine


def make_checkpoint(folder: Path) -> Path:
    """Random weights and a byte-level tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    Qwen3ForCausalLM(Qwen3Config(**SIZES, tie_word_embeddings=False, initializer_range=0.15)).save_pretrained(folder)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog"], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>").save_pretrained(folder)
    return folder


@contextmanager
def server(model: Path, folder: Path, backend: str, settings: dict[str, str]) -> Iterator[str]:
    """vLLM's own server on a free port; its address while it runs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "flagtree.serve.launch", "serve", str(model), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--served-model-name", "tiny", "--max-model-len", "256", "--max-num-seqs", "4", "--dtype", "float32"]
    command += ["-cc.mode=2", f"-cc.backend={backend}", '-cc.custom_ops=["none"]']
    command += ["--additional-config", json.dumps({"flagtree": settings}), "--worker-extension-cls", "flagtree.serve.worker.Report"]
    # the report by HTTP is one of vLLM's development routes: on loopback only
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_DO_NOT_TRACK": "1", "VLLM_CPU_KVCACHE_SPACE": "1",
                   "VLLM_SERVER_DEV_MODE": "1", "VLLM_CACHE_ROOT": str(folder / "vllm"), "VLLM_LOGGING_LEVEL": "WARNING",
                   "no_proxy": "127.0.0.1,localhost"}
    log = folder / "server.log"
    with log.open("w") as told:
        process = subprocess.Popen(command, env=environment, stdout=told, stderr=told, start_new_session=True)
    address = f"http://127.0.0.1:{port}"
    try:
        wait_until_healthy(address, process, log)
        yield address
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(timeout=60)
        finally:
            with suppress(ProcessLookupError):  # nothing of it is left, as it should be
                os.killpg(process.pid, signal.SIGKILL)


def wait_until_healthy(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until the server answers; RuntimeError with the end of its log where it stops."""
    end = time.monotonic() + STARTS_WITHIN
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(f"the server stopped with {process.returncode}:\n{log.read_text()[-3000:]}")
        try:
            urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"{address}/health", timeout=2)
            return
        except OSError:
            time.sleep(0.5)
    raise RuntimeError(f"the server does not answer after {STARTS_WITHIN} s:\n{log.read_text()[-3000:]}")


def ask(address: str) -> str:
    """One completion with the client that everybody has."""
    import httpx
    from openai import OpenAI

    client = OpenAI(base_url=f"{address}/v1", api_key="none", http_client=httpx.Client(trust_env=False))
    answer = client.completions.create(
        model="tiny", prompt="the quick brown fox", max_tokens=12, temperature=0, extra_body={"return_token_ids": True, "ignore_eos": True}
    )
    return str(answer.choices[0].model_dump()["token_ids"])


def report(address: str) -> dict:
    """What the first worker found, missed and compiled."""
    body = json.dumps({"method": "flagtree_report"}).encode()
    request = urllib.request.Request(f"{address}/collective_rpc", body, {"Content-Type": "application/json"})
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as reply:
        return json.load(reply)["results"][0]


def main() -> None:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(f"skipped: {', '.join(missing)} not installed; pip install 'flagtree-toolkit[models,vllm]'")
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = make_checkpoint(folder / "model")
        print("1. a first start writes down the graph that vLLM asks for", flush=True)
        with server(model, folder, "flagtree.serve.bundles.store", {"strict": "off", "record": str(folder / "graphs.jsonl")}) as address:
            recorded = ask(address)
        print("2. flagtree compiles it", flush=True)
        command = [sys.executable, "-m", "flagtree", "compile", "--graphs", str(folder / "graphs.jsonl"), "--target", "cpu", "--json"]
        done = subprocess.run([*command, "-o", str(folder / "bundles")], check=True, capture_output=True, text=True)
        bundle = json.loads(done.stdout)["bundles"][0]
        print("3. a strict start from the bundle", flush=True)
        backend = f"flagtree.serve.bundles.d_{bundle['digest']}"
        with server(model, folder, backend, {"bundle": bundle["path"], "strict": "serve"}) as address:
            served, counts = ask(address), report(address)
    assert served == recorded, (served, recorded)
    assert counts["flagtree"]["graphs_compiled"] == counts["inductor_kernels"] == 0
    kernels = counts["flagtree"]["kernels"]
    print(f"{served}: the tokens of both starts; the second ran {kernels} kernels of the bundle and compiled nothing")


if __name__ == "__main__":
    main()
