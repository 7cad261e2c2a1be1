"""A vendor's platform for tests: vLLM's CPU platform with our compiler for the pieces of mode 3, which that platform switches off.

`register` is the entry point `vllm.platform_plugins` of a distribution that test_doors_engine.py lays on the path.
"""

from __future__ import annotations

import functools
from typing import Any


def register() -> str:
    return f"{__name__}.Platform"


def __getattr__(name: str) -> Any:
    if name == "Platform":
        return _platform()
    raise AttributeError(name)


@functools.cache
def _platform() -> type:
    from vllm.platforms.cpu import CpuPlatform

    class Platform(CpuPlatform):
        @classmethod
        def get_compile_backend(cls) -> str:
            return "flagtree.serve.compiler.Compiler"

        @classmethod
        def check_and_update_config(cls, vllm_config: Any) -> None:
            compilation = vllm_config.compilation_config
            asked = compilation.mode, compilation.backend
            super().check_and_update_config(vllm_config)  # it makes mode 3 mode 2 with Inductor
            if asked[0] is not None and int(asked[0]) == 3:
                compilation.mode, compilation.backend = asked
                compilation.ir_enable_torch_wrap = False
                compilation.compile_sizes = compilation.compile_sizes or []

    return Platform
