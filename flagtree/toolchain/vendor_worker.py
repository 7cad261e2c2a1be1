"""Run by the Python of a vendor's Triton (3.1 or newer): describe that Triton, or build one kernel with it.

Needs nothing of ours but `triton_worker.py`, its neighbour.  `vendor_worker.py REQUEST` reads the request's JSON file and writes the
answer's, whose place the request names; binaries lie beside it.  A failure is {"error": text}.  Started by toolchain.other_triton.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
from pathlib import Path
from typing import Any

from triton_worker import load_function, without_promises  # type: ignore[import-not-found]

sys.path[:] = [p for p in sys.path if p and Path(p).resolve() != Path(__file__).resolve().parent]  # our other modules have common names


def describe(request: dict[str, Any]) -> dict[str, object]:
    """The release of Triton, its backends, those that make code for the asked GPU, and a hash of what decides the bytes that it makes."""
    import triton
    from triton.backends import backends
    from triton.backends.compiler import GPUTarget

    able = [name for name, backend in backends.items() if backend.compiler.supports_target(GPUTarget(*request["gpu"]))]
    found = {"triton": triton.__version__, "python": platform.python_version(), "backends": sorted(backends), "able": able}
    if not able:
        return {**found, "fingerprint": ""}
    root = Path(triton.__file__).resolve().parent
    parts = sorted(p for folder in ("_C", "backends", "compiler") for p in (root / folder).rglob("*") if p.suffix in (".so", ".py", ".bc"))
    digest = hashlib.sha256()
    for part in parts:
        digest.update(str(part.relative_to(root)).encode() + b"\0" + part.read_bytes())
    return {**found, "fingerprint": digest.hexdigest()}


def build(request: dict[str, Any]) -> dict[str, object]:
    """Both variants as they were built before: the generic one from the aligned one's TTGIR without the promises, so that every sum
    keeps its order.  Answers {"variants": {name: facts}}; the files are `<variant>.<stage>`."""
    import triton
    from triton.backends.compiler import GPUTarget

    folder, name = Path(request["folder"]), request["function"]
    target, options = GPUTarget(*request["gpu"]), request["options"]
    kernel = load_function(Path(request["source"]), name)
    made = {}
    first = triton.compile(_source(kernel, request["signature"], request["aligned"]), target=target, options=options)
    if request["aligned"]:
        made["aligned"] = first
        path = folder / f"{name}.ttgir"
        path.write_text(without_promises(first.asm["ttgir"]))
        made["generic"] = triton.compile(str(path), target=target, options=options)
    else:
        made["generic"] = first
    return {"variants": {variant: _kept(folder, variant, compiled, request["stages"], name) for variant, compiled in made.items()}}


def _source(kernel: Any, signature: list[list[str]], aligned: list[str]) -> Any:
    """Triton's description of the kernel; 3.1 counts arguments, newer releases name them."""
    import triton
    from triton.compiler import ASTSource

    promised = [k for k, (name, _) in enumerate(signature) if name in aligned]
    release = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if release < (3, 2):
        from triton.compiler import AttrsDescriptor

        attrs = AttrsDescriptor(divisible_by_16=tuple(promised), equal_to_1=())
        return ASTSource(fn=kernel, signature={k: kind for k, (_, kind) in enumerate(signature)}, constants={}, attrs=attrs)
    if release < (3, 3):
        from triton.backends.compiler import AttrsDescriptor as Described

        described = Described.from_dict({"arg_properties": {"tt.divisibility": promised}, "cls": "AttrsDescriptor"})
        return ASTSource(fn=kernel, signature=dict(signature), constants={}, attrs=described)
    return ASTSource(kernel, dict(signature), {}, {(k,): [["tt.divisibility", 16]] for k in promised})


def _kept(folder: Path, variant: str, compiled: Any, stages: list[str], function: str) -> dict[str, object]:
    for stage in stages:
        content = compiled.asm[stage]
        (folder / f"{variant}.{stage}").write_bytes(content if isinstance(content, bytes) else content.encode())
    m = compiled.metadata
    scratch = max(getattr(m, "global_scratch_size", 0) or 0, getattr(m, "profile_scratch_size", 0) or 0)
    return {"function": m.name, "shared": m.shared, "warps": m.num_warps, "scratch": scratch,
            "arguments": count_arguments(str(compiled.asm.get("llir", "")), function)}


def count_arguments(llir: str, function: str) -> int:
    """Parameters in the kernel's definition in LLVM IR, -1 where the text has none."""
    start = next((line for line in llir.splitlines() if line.startswith("define ") and f"@{function}(" in line), None)
    if start is None:
        return -1
    depth, count, empty = 1, 0, True
    for sign in start[start.index(f"@{function}(") + len(function) + 2 :]:
        if sign in "([{<":
            depth += 1
        elif sign in ")]}>":
            depth -= 1
            if depth == 0:
                break
        elif sign == "," and depth == 1:
            count += 1
        elif not sign.isspace():
            empty = False
    return 0 if empty else count + 1


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    try:
        answer = {"describe": describe, "build": build}[request["do"]](request)
    except Exception as e:  # a compiler's failure is an answer
        answer = {"error": f"{type(e).__name__}: {e}"[-4000:]}
    Path(request["answer"]).write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main()
