"""A compile report made by hand, with every kind of row: what the tests of the tables and of the command line print."""

from flagtree.check.report import BundleReport, CompileReport, ExternRow, KernelRow, PartReport

SDK = "the vendor's mcfatbin; install MetaX's SDK and run `flagtree finalize`"
NORM = ("aten.add.Tensor", "aten.pow.Tensor_Scalar", "aten.mean.dim", "aten.add.Tensor", "aten.rsqrt.default", "aten.mul.Tensor",
        "aten.mul.Tensor")


def kernel(name: str, digest: str, *, launches: int = 36, ops: tuple[str, ...] = NORM, before: int = 352_400_000,
           after: int = 67_100_000, tier: str = "llir", registers: int | None = None, shared: int | None = None) -> KernelRow:
    missing = "" if tier == "binary" else SDK
    return KernelRow(name, digest * 32, "prefill", launches, ops, tier, missing, before, after, registers, None, shared)


def report() -> CompileReport:
    """One model, two targets: a tier with something missing and no registers, and binaries with all the numbers."""
    externs = (ExternRow("aten.linear.default", "prefill", 252, 25_066_800_000, "gemm"),
               ExternRow("flagtree.attention.default", "prefill", 36, 1_508_400_000, "attention is the platform's own"))
    metax = (kernel("add_rms_norm", "a1", shared=512),
             kernel("silu_mul", "b2", ops=("aten.sigmoid.default", "aten.mul.Tensor"), before=956_300_000, after=151_000_000),
             kernel("embedding", "c3", launches=1, ops=("aten.embedding.default",), before=33_600_000, after=33_600_000))
    sm90 = tuple(kernel(k.name, d, launches=k.launches, ops=k.ops, before=k.bytes_before, after=k.bytes_after, tier="binary", registers=r,
                        shared=s) for k, d, r, s in zip(metax, ("d4", "e5", "f6"), (40, 28, 16), (32, 0, 0), strict=True))
    bundles = []
    for target, rows, tiers, ran in (("metax", metax, {"llir": 3}, {"maca-ir (emulated)": 3}), ("cuda:sm90", sm90, {"binary": 3}, {})):
        part = PartReport("prefill", target, rows, externs, launches_total=73, weights=399, launches_per_layer=14,
                          bytes_before_per_layer=3_024_000_000, bytes_after_per_layer=1_067_000_000,
                          symbols={"batch": (1, 64, 1), "tokens": (1, 40960, 8)}, reference={"batch": 1, "tokens": 2048})
        bundles.append(BundleReport(target, f"/home/someone/.cache/flagtree/bundles/qwen3-{target}", "9f" * 32, (part,), tiers,
                                    {"capture": 9.4, "passes": 3.2, "kernels": 31.0}, executed=ran))
    return CompileReport("qwen3", tuple(bundles))
