"""The backend `maca` for stock Triton 3.6 to 3.9: TTIR to TTGIR with 64-lane warps to MACA LLVM IR, without vendor software.

Imports triton, so only worker processes import this module.  The invariant: it is registered in code, at first use, and never where
a vendor's own `maca` stands.  `triton.compile(source, target=GPUTarget("maca", 80, 64))` then runs the stages below.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import triton
from triton._C.libtriton import amd, ir, llvm, passes
from triton.backends import Backend, backends
from triton.backends.compiler import GPUTarget, Language
from triton.compiler import make_backend

from flagtree.errors import ToolchainError
from flagtree.toolchain.maca_ir import LANES, convert
from flagtree.toolchain.ttir_backend import CompileOnly, TtirBackend, TtirOptions, check_release, manager_of, portable_ttir

NAME = "maca"
PROCESSORS = {80: "xcore1000", 86: "xcore1500", 89: "xcore1600"}  # capability -> mxcc --offload-arch
SHARED_BYTES = 64 * 1024  # of one block
MAX_WARPS = 8  # C550: 512 threads a block
# The wave64 ISA whose lowering is borrowed: every tested release has it, and it uses no buffer instructions unless asked.
LOWERING = "gfx90a"


def register() -> None:
    """Make `maca` known to this process's Triton.

    Does nothing when a backend of that name is there (ours, or MetaX's own).  Raises ToolchainError for an untested Triton.
    """
    if NAME in backends:
        return
    check_release()
    backends[NAME] = Backend(compiler=MacaBackend, driver=MacaDriver)


@dataclass(frozen=True)
class MacaOptions(TtirOptions):
    """Triton's options of one compilation.  Raises ToolchainError for what the hardware does not have."""

    warp_size: int = LANES
    maxnreg: int | None = None
    launch_cooperative_grid: bool = False
    backend_name: str = NAME
    arch: int = 80
    matrix_cores: bool = True  # False: tl.dot by fused multiply-adds
    ttir_of: tuple[str, object, int] | None = None  # GPUTarget whose own passes make the TTIR: to run what another target ships

    def __post_init__(self) -> None:
        if not 0 < self.num_warps <= MAX_WARPS or self.num_warps & (self.num_warps - 1):
            raise ToolchainError(
                f"num_warps={self.num_warps} does not fit MACA",
                why=f"a block has at most {MAX_WARPS} warps of {LANES} threads",
                hint="use 1, 2, 4 or 8",
            )
        if self.num_ctas != 1:
            raise ToolchainError(f"num_ctas={self.num_ctas} does not fit MACA", why="the hardware has no thread block clusters")


class MacaBackend(TtirBackend):
    """Stages `ttir`, `ttgir`, `llir`; the result of `llir` is the text of a MACA module."""

    binary_ext = "llir"
    options = MacaOptions

    def __init__(self, target: GPUTarget) -> None:
        super().__init__(target)
        if target.arch not in PROCESSORS or target.warp_size != LANES:
            raise ToolchainError(f"unknown MACA target {target}", why=f"capabilities: {sorted(PROCESSORS)}, warps of {LANES}")

    @staticmethod
    def supports_target(target: GPUTarget) -> bool:
        return target.backend == NAME

    def load_dialects(self, ctx: Any) -> None:
        amd.load_dialects(ctx)

    def add_stages(self, stages: dict[str, Callable], options: MacaOptions, language: Language = Language.TRITON) -> None:
        if language != Language.TRITON:
            raise ToolchainError(f"the MACA lowering takes Triton, not {language}")
        stages["ttir"] = lambda module, metadata: make_ttir(module, metadata, options)
        stages["ttgir"] = lambda module, metadata: make_ttgir(module, options)
        stages["llir"] = lambda module, metadata: make_llir(module, metadata, options).encode()


class MacaDriver(CompileOnly):
    """A driver that is never active: it must not compete with CUDA's on a machine that has a GPU."""

    why = "the MACA lowering only compiles"
    hint = "load the bundle on a machine with MetaX's SDK"


def _add(namespace: Any, name: str, manager: Any, *signatures: tuple) -> None:
    """Add a pass whose binding changed between releases: with the first argument list that fits."""
    add = getattr(namespace, name)
    for arguments in signatures:
        try:
            add(manager, *arguments)
        except TypeError:
            continue
        return
    raise ToolchainError(f"the MACA lowering cannot use Triton {triton.__version__}", why=f"the pass {name} has an unknown signature")


def make_ttir(module: Any, metadata: dict[str, Any], options: MacaOptions) -> Any:
    """Target-independent cleaning of Triton IR: the upstream list, or exactly what Triton does for `options.ttir_of`."""
    if options.ttir_of is not None:
        backend = make_backend(GPUTarget(*options.ttir_of))
        stages: dict[str, Callable] = {}
        backend.add_stages(stages, backend.parse_options({"enable_fp_fusion": options.enable_fp_fusion}), Language.TRITON)
        return stages["ttir"](module, metadata)
    return portable_ttir(module)


def make_ttgir(module: Any, options: MacaOptions) -> Any:
    """Layouts for warps of 64 lanes; `tl.dot` to matrix instructions of 16x16x16."""
    manager = manager_of(module)
    passes.ttir.add_convert_to_ttgpuir(manager, f"{NAME}:{options.arch}", options.num_warps, LANES, 1)
    passes.ttgpuir.add_coalesce(manager)
    passes.ttgpuir.add_f32_dot_tc(manager, False)
    passes.ttgpuir.add_remove_layout_conversions(manager)
    passes.ttgpuir.add_optimize_thread_locality(manager)
    if options.matrix_cores:
        amd.passes.ttgpuir.add_accelerate_matmul(manager, LOWERING, 16, 1)
        passes.ttgpuir.add_remove_layout_conversions(manager)
        amd.passes.ttgpuir.add_optimize_dot_operands(manager, LOWERING)
    passes.ttgpuir.add_remove_layout_conversions(manager)
    passes.ttgpuir.add_reduce_data_duplication(manager)
    passes.ttir.add_loop_aware_cse(manager)
    passes.common.add_canonicalizer(manager)
    passes.common.add_cse(manager)
    passes.common.add_symbol_dce(manager)
    manager.run(module, "make_ttgir")
    if not module.verify():
        raise ToolchainError("Triton's GPU IR does not verify after the MACA layouts")
    return module


def make_llir(module: Any, metadata: dict[str, Any], options: MacaOptions) -> str:
    """MACA LLVM IR.  Sets `shared` (bytes), `num_warps` and `name`.  Raises ToolchainError above the hardware's shared memory."""
    # the borrowed lowering asks the module for an AMD processor, for this step only
    module.set_attr("ttg.target", ir.builder(module.context).get_string_attr(f"hip:{LOWERING}"))
    manager = manager_of(module)
    passes.convert.add_scf_to_cf(manager)
    passes.convert.add_index_to_llvmir(manager)
    _add(amd.passes.ttgpuir, "add_allocate_shared_memory", manager, (LOWERING,), ())
    if hasattr(amd.passes.ttgpuir, "add_membar"):  # part of the lowering in 3.6
        _add(amd.passes.ttgpuir, "add_membar", manager, (LOWERING,), ())
    passes.ttgpuir.add_allocate_global_scratch_memory(manager)
    amd.passes.ttgpuir.add_to_llvmir(manager, LOWERING, True)
    passes.common.add_canonicalizer(manager)
    passes.common.add_cse(manager)
    passes.convert.add_cf_to_llvmir(manager)
    passes.convert.add_arith_to_llvmir(manager)
    passes.common.add_canonicalizer(manager)
    passes.common.add_cse(manager)
    passes.common.add_symbol_dce(manager)
    _add(amd.passes.ttgpuir, "add_builtin_func_to_llvmir", manager, (LOWERING, True), (True,))
    if hasattr(passes.convert, "add_reconcile_unrealized_casts"):
        passes.convert.add_reconcile_unrealized_casts(manager)
    manager.run(module, "make_llir")
    shared: int = module.get_int_attr("ttg.shared")
    if shared > SHARED_BYTES:
        raise ToolchainError(
            f"the kernel needs {shared} bytes of shared memory", why=f"a block has {SHARED_BYTES}", hint="use smaller tiles or fewer stages"
        )
    metadata["shared"], metadata["num_warps"], metadata["tensordesc_meta"] = shared, options.num_warps, None
    for kind in ("global_scratch", "profile_scratch"):
        metadata[f"{kind}_size"] = module.get_int_attr(f"ttg.{kind}_memory_size") or 0
        metadata[f"{kind}_align"] = module.get_int_attr(f"ttg.{kind}_memory_alignment") or 1
    llvm.init_targets()
    context = llvm.context()
    result = convert(str(llvm.to_module(module, context)), PROCESSORS[options.arch], options.num_warps)
    metadata["name"] = result.function
    return result.text
