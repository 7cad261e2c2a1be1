"""The process that runs Triton: one kernel source in, compiled stages of both variants out.  Run as a script by `triton_aot`.

Imports nothing of ours, so that it starts fast and a crash of LLVM takes nothing with it.  Requests and answers are lines of
JSON on standard input and output; results lie in files of the folder that the request names; a failure is {"error": text}.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

_LOCATIONS = (re.compile(r"^#loc\d* = loc\(.*\)\n", re.MULTILINE), re.compile(r" loc\((?:[^()]|\([^()]*\))*\)"))
# the promise itself, and what Triton >= 3.8 concludes from it on AMD's buffer operations
_PROMISE = re.compile(r"(?:, )?(?:tt\.divisibility|\bcontiguity) = \d+ : i32")


def configure(cache: str) -> None:
    """Make a build depend on nothing but the request: own cache, no line info, no dumps, overrides or interpreter."""
    from triton import knobs

    knobs.cache.dir = cache
    knobs.compilation.disable_line_info = True
    knobs.compilation.override = False
    knobs.compilation.dump_ir = False
    knobs.compilation.store_binary_only = False
    knobs.runtime.interpret = False


def load_function(path: Path, name: str) -> Any:
    """The @triton.jit function of a module in a real file: Triton reads its source through `inspect`."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


def without_promises(text: str) -> str:
    """TTIR or TTGIR that promises nothing about its arguments; layouts, and so the order of every sum, stay as they are."""
    return re.sub(r" \{\}(?=,|\)| loc| :)", "", _PROMISE.sub("", text).replace("{, ", "{"))


def without_locations(text: str) -> str:
    for pattern in _LOCATIONS:
        text = pattern.sub("", text)
    return text


def _bytes(stage: str, content: str | bytes) -> bytes:
    if isinstance(content, bytes):
        return content
    return (without_locations(content) if stage in ("ttir", "ttgir") else content).encode()


def _facts(kernel: Any) -> dict[str, object]:
    """What the compiler says about one variant: shared bytes, threads, scratch, registers and spills where a tool tells."""
    m = kernel.metadata
    facts: dict[str, object] = {
        "shared": m.shared,
        "threads": m.num_warps * m.target.warp_size,
        "scratch": max(getattr(m, "global_scratch_size", 0) or 0, getattr(m, "profile_scratch_size", 0) or 0),
    }
    asm = kernel.asm
    if "cubin" in asm:
        facts |= _cubin_facts(asm["cubin"])
        header = re.search(r"\.entry[^{]*?\(([^)]*)\)", asm["ptx"])
        facts["arguments"] = header.group(1).count(".param") if header else -1
    elif "amdgcn" in asm:
        facts |= amdgcn_facts(asm["amdgcn"])
    return facts


def _cubin_facts(cubin: bytes) -> dict[str, object]:
    from triton import knobs

    path = Path("resources.cubin")
    path.write_bytes(cubin)
    done = subprocess.run([knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)], capture_output=True, text=True, check=True)
    found = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", done.stdout))
    return {"registers": int(found["REG"]), "spills": int(found["STACK"]) + int(found["LOCAL"])}


def amdgcn_facts(text: str) -> dict[str, object]:
    """Registers, private bytes a thread and arguments, from the metadata at the end of AMD's assembly."""

    def number(key: str) -> int:
        match = re.search(rf"^\s*\.{key}:\s+(\d+)", text, re.MULTILINE)
        return int(match.group(1)) if match else 0

    arguments = re.search(r"^\s*(?:- )?\.args:\n(.*?)^    \.", text, re.MULTILINE | re.DOTALL)
    return {
        "registers": number("vgpr_count"), "scalar_registers": number("sgpr_count"), "spills": number("private_segment_fixed_size"),
        "arguments": arguments.group(1).count(".offset:") if arguments else -1,
    }  # fmt: skip


def build(request: dict[str, Any]) -> dict[str, object]:
    """Compile both variants.  The aligned one goes the whole way; the generic one starts at its TTGIR without the promises.  Copies that
    run ahead of a loop need them (NVIDIA's move no less than four bytes): where there are any its loads wait; layouts and sums stay.

    Answers {"variants": {name: {"stages": [...], facts...}}}; the files are `<variant>.<stage>` in the request's folder.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if request.get("prepare"):
        module, _, function = request["prepare"].partition(":")
        getattr(importlib.import_module(module), function)()
    folder = Path(request["folder"])
    kernel = load_function(Path(request["source"]), request["function"])
    signature = dict(request["signature"])
    constexprs = dict(request["constexprs"])
    signature |= dict.fromkeys(constexprs, "constexpr")
    attrs = {(k,): [["tt.divisibility", 16]] for k, (name, _) in enumerate(request["signature"]) if name in request["aligned"]}
    backend, arch, warp = request["gpu"]
    target = GPUTarget(backend, arch, warp)
    source = ASTSource(kernel, signature, constexprs, attrs)
    aligned = triton.compile(source, target=target, options=request["options"])
    variants: dict[str, Any] = {}
    last = "ttgir" if "ttgir" in aligned.asm else "ttir"
    promised = aligned.asm[last] if last == "ttgir" else aligned.asm[last].decode()  # the last stage of all comes as bytes
    if "ttg.async_copy_global_to_local" in promised:
        promised = triton.compile(source, target=target, options={**request["options"], "num_stages": 1}).asm[last]
    unpromised = without_promises(promised)
    if unpromised == promised:
        variants["generic"] = (aligned, {**aligned.asm, last: promised})
    elif last == "ttir":  # the tier `ttir`: nothing is compiled from it here
        variants["aligned"] = (aligned, {"ttir": promised})
        variants["generic"] = (aligned, {"ttir": unpromised})
    else:
        path = folder / f"{request['function']}.ttgir"
        path.write_text(unpromised)
        generic = triton.compile(str(path), target=target, options=request["options"])
        variants["aligned"] = (aligned, aligned.asm)
        variants["generic"] = (generic, {**generic.asm, "ttir": without_promises(aligned.asm["ttir"])})
    answer: dict[str, object] = {}
    for name, (compiled, asm) in variants.items():
        stages = [s for s in request["stages"] if s in asm]
        for stage in stages:
            (folder / f"{name}.{stage}").write_bytes(_bytes(stage, asm[stage]))
        answer[name] = {"stages": stages, **_facts(compiled)}
    return {"variants": answer}


def main() -> None:
    """Answer requests until standard input ends.  The first line says where to work and what may be imported."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a compiler prints goes to the log, not between our answers
    first = json.loads(sys.stdin.readline())
    os.chdir(first["folder"])
    sys.path[:] = [first["root"], *(p for p in sys.path if p and Path(p).resolve() != Path(__file__).resolve().parent)]
    configure(first["cache"])
    for line in sys.stdin:
        try:
            answer = build(json.loads(line))
        except Exception as e:
            answer = {"error": f"{type(e).__name__}: {e}"[-4000:]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
