"""`flagtree compile --for vllm` against the real engine: the key, the kernels and the served tokens are those of a recording.

Needs the extra `vllm`; run with `-m vllm`.  The engine is stopped where it asks for its compiler, or serves from the bundle.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flagtree.artifact.bundle import open_bundle
from flagtree.artifact.recording import RecordedGraph, read_recorded
from flagtree.capture.ahead import capture_ahead, server_model
from flagtree.errors import CaptureError
from flagtree.graphs import compile_graphs
from tests.serve.architectures import ARCHITECTURES

pytestmark = pytest.mark.vllm
QWEN3: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "dtype": "float32", "vocab_size": 512, "hidden_size": 128,
    "intermediate_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "hidden_act": "silu", "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False,
}  # fmt: skip
STEP3: dict[str, Any] = {
    "architectures": ["Step3TextForCausalLM"], "model_type": "step3_text", "dtype": "bfloat16", "vocab_size": 1024, "hidden_size": 256,
    "intermediate_size": 512, "num_hidden_layers": 7, "num_attention_heads": 8, "num_attention_groups": 1, "share_q_dim": 128,
    "head_dim": 64, "rope_theta": 5e5, "max_seq_len": 2048, "max_position_embedding": 2048, "moe_intermediate_size": 128,
    "moe_num_experts": 8, "moe_top_k": 2, "share_expert_dim": 128, "norm_expert_weight": False, "moe_layers_enum": "1,2,3,4,5,6",
    "rms_norm_eps": 1e-6, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip

# a start of the engine that ends where it asks for its compiler: each rank writes its key's text
KEEP_KEY = """
import os
import torch.distributed
from flagtree.serve.graph import key_of, served_graph

def keep(module, inputs, **options):
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    with open(os.path.join(os.path.dirname(__file__), f"rank{rank}.txt"), "w") as file:
        file.write(key_of(served_graph(module)).text)
    raise RuntimeError("the key is written")
"""
START = """
import json, sys
from vllm import LLM

if __name__ == "__main__":
    compilation = {"mode": 2, "backend": "keep_key.keep", "custom_ops": ["none"]}
    try:
        LLM(model=sys.argv[1], load_format="dummy", skip_tokenizer_init=True, max_model_len=512, max_num_seqs=8, max_num_batched_tokens=64,
            tensor_parallel_size=int(sys.argv[2]), compilation_config=compilation)
    except Exception as error:
        print(error)
"""


def described(folder: Path, config: dict[str, Any]) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return str(folder)


def environment(repository: Path, folder: Path, **more: str) -> dict[str, str]:
    return {
        **os.environ, "PYTHONPATH": f"{repository}{os.pathsep}{folder}", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", **more,
    }  # fmt: skip


@pytest.mark.parametrize("degree", [1, 2])
def test_the_key_is_that_of_every_rank_of_the_engine(degree: int, repository: Path, tmp_path: Path) -> None:
    model = described(tmp_path / "model", QWEN3)
    (tmp_path / "keep_key.py").write_text(KEEP_KEY)
    (tmp_path / "start.py").write_text(START)
    threads = "|".join(str(core) for core in range(degree))
    ran = subprocess.run(
        [sys.executable, str(tmp_path / "start.py"), model, str(degree)], cwd=tmp_path, check=False, capture_output=True, text=True,
        env=environment(repository, tmp_path, VLLM_CPU_OMP_THREADS_BIND=threads), timeout=900,
    )  # fmt: skip
    written = sorted(tmp_path.glob("rank*.txt"))
    assert written, ran.stdout[-2000:] + ran.stderr[-2000:]
    for rank in range(degree):
        (graph,) = capture_ahead(server_model(model), [degree], rank=rank)
        assert [path.read_text() for path in written] == [graph.text] * len(written)


@pytest.fixture(scope="module")
def recorded(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, RecordedGraph, Any]:
    """A checkpoint, what a lenient start of the default engine records of it, and the tokens of eager mode."""
    from tests.serve import checkpoints

    folder = tmp_path_factory.mktemp("ahead")
    model = str(checkpoints.write("qwen3", folder / "model", num_hidden_layers=6))
    compilation = {"mode": 2, "backend": "flagtree.serve.bundles.store", "custom_ops": ["none"]}
    settings = {"strict": "off", "record": str(folder / "graphs.jsonl")}
    run(repository, folder, model, "off", {"compilation_config": compilation, "additional_config": {"flagtree": settings}})
    eager = run(repository, folder, model, "eager", {"enforce_eager": True, "compilation_config": {"custom_ops": ["none"]}})
    (graph,) = read_recorded(folder / "graphs.jsonl")
    return model, graph, eager


def run(repository: Path, folder: Path, model: str, name: str, arguments: dict[str, Any]) -> Any:
    job, out = folder / f"{name}.job.json", folder / f"{name}.json"
    job.write_text(json.dumps({"model": model, "image": "", "runs": {name: {"arguments": arguments}}}))
    command = [sys.executable, "-m", "tests.serve.engine", str(job), str(out)]
    env = environment(repository, folder, VLLM_CACHE_ROOT=str(folder / "vllm"))
    done = subprocess.run(command, cwd=repository, env=env, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(out.read_text())[name]


def test_the_kernels_are_those_of_a_recording_and_a_strict_start_serves(
    recorded: tuple[str, RecordedGraph, Any], repository: Path, tmp_path: Path
) -> None:
    model, graph, eager = recorded
    command = [sys.executable, "-m", "flagtree", "compile", model, "--for", "vllm", "--tp", "1,2", "--dtype", "f32", "--json",
               "-o", str(tmp_path)]  # fmt: skip
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    (bundle,) = json.loads(done.stdout)["bundles"]
    names = [part["name"] for part in bundle["parts"]]
    assert len(names) == 2
    assert names[0] == graph.name
    assert "predicted" in bundle["parts"][0]["about"]
    ahead = open_bundle(Path(bundle["path"]))
    (made,) = compile_graphs([graph], ["cpu"], out=tmp_path / "recorded").bundles
    from_recording = open_bundle(Path(made.path))
    assert kernels(ahead.part(graph.name)) == kernels(from_recording.part(graph.name))
    backend = f"flagtree.serve.bundles.d_{bundle['digest'].removeprefix('sha256:')}"
    arguments = {
        "compilation_config": {"mode": 2, "backend": backend, "custom_ops": ["none"]},
        "additional_config": {"flagtree": {"bundle": bundle["path"], "strict": "serve"}},
    }
    served = run(repository, tmp_path, model, "strict", arguments)
    assert served["ids"] == eager["ids"]
    counts = served["reports"][0]["flagtree"]
    assert (counts["graphs_found"], counts["graphs_missing"], counts["graphs_compiled"]) == (1, 0, 0)


def kernels(launch: Any) -> list[str]:
    """Digests in order of launch, a repeat's once."""
    steps = [inner for step in launch["steps"] for inner in (step["steps"] if "repeat" in step else [step])]
    return [step["kernel"] for step in steps if "kernel" in step]


def test_depth_costs_nothing_after_capture(tmp_path: Path) -> None:
    shallow, deep = (capture_ahead(server_model(described(tmp_path / "m", {**QWEN3, "num_hidden_layers": n})), [1])[0] for n in (7, 12))
    assert len(shallow.layers) >= 3  # the ends differ from the layers between
    assert len(deep.layers) == len(shallow.layers) + 5
    assert shallow.program.count("\n") == deep.program.count("\n")


def test_experts_behind_dense_layers_are_captured(tmp_path: Path) -> None:
    (graph,) = capture_ahead(server_model(described(tmp_path / "m", STEP3)), [2])
    assert "_C.cpu_fused_moe" in graph.text
    assert graph.facts["tensor_parallel"] == "2"
    assert graph.layers, "the equal layers with experts are one period"


def test_what_vllm_does_not_have_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match="no model class Qwen9ForCausalLM") as raised:
        capture_ahead(server_model(described(tmp_path / "m", {**QWEN3, "architectures": ["Qwen9ForCausalLM"]})), [1])
    assert "closest" in raised.value.why


def test_what_vllm_cannot_trace_names_the_line_of_the_model(tmp_path: Path) -> None:
    """Its CPU build does not route as MiniMax-M2 does, and says so by an assertion."""
    with pytest.raises(CaptureError, match="vLLM cannot trace MiniMaxM2ForCausalLM") as raised:
        capture_ahead(server_model(described(tmp_path / "m", ARCHITECTURES["minimax_m2"].configuration({}))), [1])
    assert "cpu_router.py" in raised.value.why
    assert 'self.scoring_func == "softmax"' in raised.value.why


def test_the_graph_of_a_gpu_is_predicted_as_this_one_s_on_that_device(tmp_path: Path) -> None:
    model = server_model(described(tmp_path / "m", QWEN3))
    (here,), (there,) = (capture_ahead(model, [1], device=device) for device in ("cpu", "cuda"))
    assert there.key != here.key
    assert there.text == here.text.replace("cpu", "cuda")
    assert there.facts["predicted"] == "from vLLM's model class, for cuda"
    assert _numbered(there.program) == _numbered(here.program)


def _numbered(program: str) -> str:
    """Without the name, which is the key's; temporaries numbered as they appear: a trace numbers views that it drops as well, other
    ones on another device."""
    names: dict[str, str] = {}
    body = program.partition("\n")[2]
    return re.sub(r"\b\w+_tensor(_\d+)?\b", lambda found: names.setdefault(found[0], f"tensor_{len(names)}"), body)


def test_the_graph_of_another_platform_is_refused_where_it_cannot_be_known(tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match="cannot be predicted"):
        capture_ahead(server_model(described(tmp_path / "m", QWEN3)), [2], device="cuda")
