"""Programs through the real C++ generator, toolchain, bundle and loader, against the interpreter, at each level of this CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import flagtree
from flagtree.artifact.bundle import write_bundle
from flagtree.codegen.launch import launch_list, weights
from flagtree.ir.canonical import digest, isolate_all
from flagtree.ir.interp import run
from flagtree.ir.parse import parse_program
from flagtree.passes.pipeline import pipeline, run_pipeline
from flagtree.runtime import cpu
from flagtree.targets import find_target
from flagtree.toolchain.build import build_kernels
from flagtree.toolchain.cxx import link

BLOCK = """
program block
  symbol s0 in 0..4 from dim x 0
  symbol s1 in 1..64 from dim x 1
  buffer x: {t}[s0, s1, 40] input
  buffer n: {t}[40] weight
  buffer n.0: {t}[40] weight
  buffer n.1: {t}[40] weight
  buffer g: {t}[24, 40] weight
  buffer g.0: {t}[24, 40] weight
  buffer g.1: {t}[24, 40] weight
  buffer d: {t}[40, 12] weight
  buffer d.0: {t}[40, 12] weight
  buffer d.1: {t}[40, 12] weight
  buffer kept: {t}[s0, 40] state
  buffer kept.0: {t}[s0, 40] state
  buffer kept.1: {t}[s0, 40] state
  buffer h: {t}[s0, s1, 40] temp
  buffer flat: {t}[s0*s1, 40] temp alias a + 0
  buffer a: {t}[s0, s1, 40] temp
  buffer u: {t}[s0*s1, 24] temp
  buffer v: {t}[s0*s1, 12] temp
  buffer y: {t}[s0*s1, 40] temp
  buffer last: {t}[s0, 40] temp strides(40*s1, 1) alias h + 40*s1 - 40
  kernel start {{i0 < s0, i1 < s1, i2 < 40}} numerics(eager, contract=off, acc=f32)
    v0: {t} = load x[i0, i1, i2]
    store h[i0, i1, i2] = v0
  repeat layers 2 bind n = (n.0, n.1), g = (g.0, g.1), d = (d.0, d.1), kept = (kept.0, kept.1)
    kernel norm {{i0 < s0, i1 < s1}} reduce {{r0 < 40}} numerics(eager, contract=off, acc=f32)
      v0: {t} = load h[i0, i1, r0]
      v1: f32 = cast v0
      v2: f32 = mul v1, v1
      v3: f32 = sum v2 over r0
      v4: f32 = mul v3, 0.025
      v5: f32 = add v4, 0.000001
      v6: f32 = rsqrt v5
      v7: f32 = mul v1, v6
      v8: {t} = cast v7
      v9: {t} = load n[r0]
      v10: {t} = mul v8, v9
      store a[i0, i1, r0] = v10
    extern up: (u) = aten.mm.default(flat, gt) reason "gemm"
    kernel gate {{i0 < s0*s1, i1 < 12}} numerics(eager, contract=off, acc=f32)
      v0: {t} = load u[i0, i1]
      v1: {t} = load u[i0, i1 + 12]
      v2: f32 = cast v0
      v3: f32 = cast v1
      v10: f32 = neg v2
      v11: f32 = exp v10
      v12: f32 = add v11, 1.0
      v5: f32 = div v2, v12
      v6: {t} = cast v5
      v7: f32 = cast v6
      v8: f32 = mul v7, v3
      v9: {t} = cast v8
      store v[i0, i1] = v9
    extern down: (y) = aten.mm.default(v, dt) reason "gemm"
    kernel residual {{i0 < s0, i1 < s1, i2 < 40}} numerics(eager, contract=off, acc=f32)
      v0: {t} = load h[i0, i1, i2]
      v1: {t} = load y[s1*i0 + i1, i2]
      v2: f32 = cast v0
      v3: f32 = cast v1
      v4: f32 = add v2, v3
      v5: {t} = cast v4
      store h[i0, i1, i2] = v5
    kernel keep {{i0 < s0, i1 < 40}} numerics(eager, contract=off, acc=f32)
      v0: {t} = load last[i0, i1]
      store kept[i0, i1] = v0
  buffer gt: {t}[40, 24] weight strides(1, 40) alias g + 0
  buffer dt: {t}[12, 40] weight strides(1, 12) alias d + 0
  outputs h
"""


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_a_block_with_two_layers(dtype: str, tmp_path: Path) -> None:
    program = parse_program(BLOCK.format(t=dtype))
    target = find_target("cpu")
    program, _ = run_pipeline(program, pipeline(target), target)
    isolated = {kernel.name: (one, digest(one.program)) for kernel, one in isolate_all(program)}
    launch = launch_list(program, isolated)
    assert weights(launch) == ["n.0", "n.1", "g.0", "g.1", "d.0", "d.1"]
    built = build_kernels([(d, one.program) for one, d in isolated.values()], target, 1)
    torch_type = {"f32": torch.float32, "bf16": torch.bfloat16}[dtype]
    shapes = {n: [e.constant or 0 for e in program.buffer(n).shape] for n in weights(launch)}
    bound = {n: (torch.randn(shape) * 0.3).to(torch_type) for n, shape in shapes.items()}
    for level in cpu.levels():
        library = link([(b.digest, b.files[f"{level}.o"]) for b in built], level)
        trust = write_bundle(
            tmp_path / level, name="block", target="cpu", parts={"block": launch}, kernels=built, libraries={level: library}
        )
        part = flagtree.load(tmp_path / level, trust=trust).parts["block"]
        call = part.bind(bound)
        for batch, length in ((2, 5), (1, 1), (0, 3), (4, 64), (2, 5)):
            x = torch.randn(batch, length, 40).to(torch_type)
            kept = {f"kept.{i}": torch.zeros(batch, 40, dtype=torch_type) for i in range(2)}
            expected = run(program, {"x": x, **bound, **{n: t.clone() for n, t in kept.items()}})
            out = call({"x": x, **kept})
            tolerance = {"f32": 1e-5, "bf16": 3e-2}[dtype]
            torch.testing.assert_close(out["h"], expected["h"], rtol=tolerance, atol=tolerance)
            for name, state in kept.items():
                torch.testing.assert_close(state, expected[name], rtol=tolerance, atol=tolerance)
