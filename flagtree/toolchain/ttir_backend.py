"""The backend `ttir` for stock Triton 3.6 to 3.9: Triton IR cleaned by the passes that no target owns, and nothing after it.

Imports triton, so only worker processes import this module.  The invariant: nothing here knows a chip; the warp of its GPUTarget is
the one that tiles were sized for.  `toolchain.triton_ir` uses it whole, `maca_backend` its first stage.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import triton
from triton._C.libtriton import ir, passes
from triton.backends import Backend, backends
from triton.backends.compiler import BaseBackend, GPUTarget, Language
from triton.backends.driver import DriverBase

from flagtree.errors import ToolchainError

NAME = "ttir"
TESTED = ((3, 6), (3, 7), (3, 8), (3, 9))  # pass bindings are Triton internals: an untested release is refused


def check_release() -> None:
    """ToolchainError for an untested Triton."""
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) not in TESTED:
        tested = ", ".join(f"{major}.{minor}" for major, minor in TESTED)
        raise ToolchainError(
            f"our stages are not tested with Triton {triton.__version__}", why=f"tested: {tested}", hint='install "triton>=3.6,<3.10"'
        )


def register() -> None:
    """Make `ttir` known to this process's Triton.  ToolchainError for an untested Triton."""
    if NAME not in backends:
        check_release()
        backends[NAME] = Backend(compiler=TtirBackend, driver=TtirDriver)


@dataclass(frozen=True)
class TtirOptions:
    """Triton's options of one compilation."""

    num_warps: int = 4
    num_ctas: int = 1
    num_stages: int = 2
    warp_size: int = 32
    enable_fp_fusion: bool = False
    supported_fp8_dtypes: tuple[str, ...] = ("fp8e5", "fp8e4nv")
    deprecated_fp8_dot_operand_dtypes: tuple[str, ...] = ()
    default_dot_input_precision: str = "ieee"
    allowed_dot_input_precisions: tuple[str, ...] = ("ieee",)
    max_num_imprecise_acc_default: int = 0
    extern_libs: object = ()
    debug: bool = False
    backend_name: str = NAME
    sanitize_overflow: bool = False
    arch: str | int = ""
    instrumentation_mode: str = ""

    def hash(self) -> str:
        return "_".join(f"{k}-{v}" for k, v in sorted(self.__dict__.items()))


class TtirBackend(BaseBackend):
    """One stage, `ttir`.  A chip's backend names its own file ending and options."""

    binary_ext = NAME
    options: type[TtirOptions] = TtirOptions

    @staticmethod
    def supports_target(target: GPUTarget) -> bool:
        return target.backend == NAME

    def parse_options(self, opts: dict[str, Any]) -> Any:
        known = {k: v for k, v in opts.items() if k in self.options.__dataclass_fields__ and v is not None}
        return self.options(**{**known, "arch": self.target.arch, "warp_size": self.target.warp_size})

    def pack_metadata(self, metadata: Any) -> tuple[int, int, int]:
        return metadata.num_warps, metadata.num_ctas, metadata.shared

    def get_codegen_implementation(self, options: Any) -> dict[str, Callable]:
        # the smallest tl.dot that MetaX's Triton 3.1 accepts
        return {"min_dot_size": lambda left, right: (16, 16, 32 if left.scalar.primitive_bitwidth == 8 else 16)}

    def get_module_map(self) -> dict[str, ModuleType]:
        # CUDA's names, as in MetaX's own Triton: a fork, and our converter, give each its own form
        from triton.language.extra.cuda import libdevice

        return {"triton.language.extra.libdevice": libdevice}

    def load_dialects(self, ctx: Any) -> None:
        """Triton's own dialects are all there are before a target's."""

    @functools.lru_cache  # noqa: B019 - Triton asks once per backend, and keeps few
    def hash(self) -> str:
        return f"{self.target.backend}-{triton.__version__}-{self.target.arch}"

    def add_stages(self, stages: dict[str, Callable], options: Any, language: Language = Language.TRITON) -> None:
        if language != Language.TRITON:
            raise ToolchainError(f"this stage takes Triton, not {language}")
        stages[NAME] = _stage


def _stage(module: Any, metadata: dict[str, Any]) -> Any:
    module = portable_ttir(module)
    (name,) = re.findall(r"tt\.func public @(\w+)", str(module))
    metadata |= {"name": name, "shared": 0, "tensordesc_meta": None}
    return module


def portable_ttir(module: Any) -> Any:
    """Target-independent cleaning of Triton IR: the upstream list."""
    manager = manager_of(module)
    passes.common.add_inliner(manager)
    if hasattr(passes.ttir, "add_rewrite_tensor_pointer"):  # until 3.8
        passes.ttir.add_rewrite_tensor_pointer(manager)
    passes.ttir.add_rewrite_tensor_descriptor_to_pointer(manager)
    passes.common.add_canonicalizer(manager)
    passes.ttir.add_combine(manager)
    passes.ttir.add_reorder_broadcast(manager)
    passes.common.add_cse(manager)
    passes.ttir.add_triton_licm(manager)
    passes.common.add_symbol_dce(manager)
    passes.ttir.add_loop_unroll(manager)
    manager.run(module, "make_ttir")
    return module


def manager_of(module: Any) -> Any:
    """A pass manager for the module's context."""
    manager = ir.pass_manager(module.context)
    manager.enable_debug()
    return manager


class CompileOnly(DriverBase):
    """A driver that is never active: it must not compete with a real one on a machine that has a device."""

    why = "this code generator only compiles"
    hint = ""

    @classmethod
    def is_active(cls) -> bool:
        return False

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise self._absent()

    def get_current_target(self) -> GPUTarget:
        raise self._absent()

    def get_active_torch_device(self) -> Any:
        raise self._absent()

    def get_benchmarker(self) -> Any:
        raise self._absent()

    @classmethod
    def _absent(cls) -> ToolchainError:
        return ToolchainError(cls.why, why="it has no driver", hint=cls.hint)


class TtirDriver(CompileOnly):
    """The one that belongs to `ttir`."""

    hint = "the vendor's own Triton compiles kernel.py for the chip"
