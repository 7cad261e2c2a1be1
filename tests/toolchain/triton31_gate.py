"""Run by the Python of `settings.triton31_python`: generated modules through stock Triton 3.1 for cuda:80 (its own ASTSource form)."""

import importlib.util
import json
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, AttrsDescriptor


def build(request: dict) -> str:
    """Why a module does not compile; empty when it does."""
    spec = importlib.util.spec_from_file_location(request["function"], request["path"])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    names = [name for name, _ in request["signature"]]
    attrs = AttrsDescriptor(divisible_by_16=tuple(k for k, n in enumerate(names) if n in request["aligned"]), equal_to_1=())
    source = ASTSource(
        fn=getattr(module, request["function"]), signature=dict(enumerate(t for _, t in request["signature"])), constants={}, attrs=attrs
    )
    options = {"num_warps": request["warps"], "num_stages": 1, "enable_fp_fusion": False}
    try:
        made = triton.compile(source, target=GPUTarget("cuda", 80, 32), options=options)
    except Exception as e:
        return f"{type(e).__name__}: {e}"
    return "" if made.asm["cubin"] else "no cubin"


assert triton.__version__.startswith("3.1."), triton.__version__
print(json.dumps({request["name"]: build(request) for request in json.load(sys.stdin)}))
