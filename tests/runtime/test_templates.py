"""Products of few rows at run time: the kernel up to its rows, the library's operator above, chosen by the sizes of each call."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flagtree.codegen.launch import launch_list
from flagtree.errors import BundleError
from flagtree.ir.canonical import digest, isolate_all
from flagtree.ir.interp import run as interpret
from flagtree.ir.parse import parse_program
from flagtree.passes.pipeline import run_pipeline
from flagtree.passes.small_products import SmallProducts
from flagtree.runtime import cpu
from flagtree.runtime.compile import Callee, backend
from flagtree.runtime.launch import Executable
from flagtree.runtime.prepare import Launch
from flagtree.targets import find_target
from flagtree.toolchain.build import build_kernels
from flagtree.toolchain.cxx import link
from tests.runtime.equal_to_eager import check, compare

FEW = find_target("cpu").gemm_rows.get((cpu.levels() or ("",))[0], {}).get("f32", 0)  # rows of f32 at this CPU's level


class Two(torch.nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = torch.nn.Linear(64, 96, bias=False, dtype=dtype)
        self.down = torch.nn.Linear(96, 64, bias=False, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.nn.functional.silu(self.up(x)))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Callee]:
    """Every compiled graph, in order."""
    out: list[Callee] = []
    before = Callee.__init__

    def kept(self: Callee, *args: Any) -> None:
        before(self, *args)
        out.append(self)

    monkeypatch.setattr(Callee, "__init__", kept)
    torch._dynamo.reset()
    return out


@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 4), (torch.float32, FEW)])
def test_the_rows_of_a_call_choose(made: list[Callee], dtype: torch.dtype, limit: int) -> None:
    model = Two(dtype)
    compiled = torch.compile(model, backend=backend, dynamic=True)
    exact = Two(dtype).double()
    with torch.no_grad():
        for rows in (2, limit, limit + 1, 3 * limit, 2):
            x = torch.randn(rows, 1, 64, dtype=dtype)
            compiled(x)
            with torch.autograd.profiler.profile() as seen:
                have = compiled(x)
            products = [e.name for e in seen.function_events if e.name == "aten::mm"]
            compare(model(x), have, exact(x.double()), f"{rows} rows")
            assert len(products) == (2 if rows > limit else 0), f"{rows} rows"
    assert len(made) == 1
    steps = made[0].executable.prepared.steps
    assert [s.above[1] for s in steps if isinstance(s, Launch) and s.above] == [limit, limit]


@pytest.mark.parametrize("shape", [(64,), (1, 64), (0, 64), (2, 3, 64), (1, 1, 1, 64)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_any_rank(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check(Two(dtype), torch.randn(shape, dtype=dtype))


def test_a_view_whose_rows_lie_apart() -> None:
    def last_token(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x[:, -1], w)

    check(last_token, torch.randn(3, 5, 64), torch.randn(32, 64))
    check(last_token, torch.randn(3, 5, 64)[:, :, ::1].transpose(0, 1), torch.randn(32, 64))


def test_a_call_above_that_touches_other_memory_is_refused(made: list[Callee]) -> None:
    compiled = torch.compile(Two(torch.float32), backend=backend, dynamic=True)
    with torch.no_grad():
        compiled(torch.randn(3, 64))
    launch = made[0].launch
    step = next(s for s in launch["steps"] if "above" in s)
    other = next(b["name"] for b in launch["buffers"] if b["name"] not in step["buffers"])
    step["above"]["extern"]["args"][0] = {"buffer": other}
    with pytest.raises(BundleError, match="other buffers"):
        Executable(launch, made[0].executable.prepared.library)


def test_inside_a_repeat_each_iteration_chooses_for_its_own_weights() -> None:
    text = (Path(__file__).parents[1] / "passes" / "small_products" / "any_rows.ir").read_text("utf-8")
    program = parse_program("\n".join(line for line in text.partition("// expect")[0].split("\n") if not line.startswith("//")))
    target = replace(find_target("cpu"), levels=(cpu.levels()[0],))
    made, _ = run_pipeline(program, [SmallProducts()], target)
    kernels = {k.name: (alone, digest(alone.program)) for k, alone in isolate_all(made)}
    built = build_kernels([(d, alone.program) for alone, d in kernels.values()], target, 1)
    shared = link([(b.digest, b.files[f"{target.levels[0]}.o"]) for b in built], target.levels[0])
    run = Executable(launch_list(made, kernels), cpu.load_library(shared, "test"))
    torch.manual_seed(1)
    given = {b.name: torch.randn(64, 64, dtype=torch.bfloat16) / 8 for b in run.inputs if b.role == "weight"}
    for rows in ((1, 3), (4, 3), (4, 1), (9, 3)):
        x = torch.randn(*rows, 64, dtype=torch.bfloat16)
        (have,) = run.call([given.get(b.name, x) for b in run.inputs])
        inputs = {b.name: given.get(b.name, x).clone() for b in run.inputs}
        exact = interpret(program, inputs, dtype_override="f64")["h"]
        compare(interpret(program, inputs)["h"], have, exact, f"{rows} rows")
