"""Single operators: each formula's kernel equals the formula in every layout in which a server brings its rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from flagtree.artifact.recording import read_recorded
from flagtree.errors import FlagtreeError
from flagtree.graphs import compile_graphs
from flagtree.serve.configuration import ServeSettings
from flagtree.serve.operators import FORMULAS, Operators, key_text
from flagtree.serve.server import MissingGraph, Server

Case = tuple[str, list[torch.Tensor], list[torch.Tensor | None], list]
FACTS = (("max_tokens", "64"),)


def cases(tokens: int, dtype: torch.dtype) -> list[Case]:
    wide = torch.randn(tokens, 96, dtype=dtype)
    x, residual = torch.randn(tokens, 32, dtype=dtype), torch.randn(tokens, 32, dtype=dtype)
    weight, small = torch.randn(32, dtype=dtype), torch.randn(8, dtype=dtype)
    positions, table = torch.randint(0, 20, (tokens,)), torch.randn(20, 8, dtype=dtype)
    within = wide[:, 32:64]
    return [
        ("rms_norm", [x], [weight], [1e-6]),
        ("rms_norm", [x], [None], [1e-5]),
        ("rms_norm", [within.view(tokens, 4, 8)], [small], [1e-6]),
        ("add_rms_norm", [x, residual], [weight], [1e-6]),
        ("add_rms_norm", [within, residual], [weight], [1e-6]),
        ("silu_and_mul", [wide], [], []),
        ("gelu_and_mul", [wide], [], ["none"]),
        ("gelu_and_mul", [wide[:, :64]], [], ["tanh"]),
        ("rotary", [positions, x], [table], [8, 8, True]),
        ("rotary", [positions, within], [table[:, :4].contiguous()], [8, 4, False]),
    ]


@pytest.fixture(scope="module")
def lenient(tmp_path_factory: pytest.TempPathFactory) -> tuple[Operators, Path]:
    path = tmp_path_factory.mktemp("operators") / "operators.jsonl"
    return Operators(Server(ServeSettings(record=str(path)), FACTS)), path


def check(run: Callable[..., tuple], dtype: torch.dtype, tokens: int) -> None:
    for name, rows, fixed, numbers in cases(tokens, dtype):
        before = [x.clone() for x in rows]
        want = FORMULAS[name](*rows, *fixed, *numbers)
        have = run(name, rows, fixed, numbers)
        for a, b in zip(have, want if isinstance(want, tuple) else (want,), strict=True):
            tolerance = 1e-5 if dtype == torch.float32 else 1e-2
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")
        for a, b in zip(rows, before, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_equal_their_formulas(lenient: tuple[Operators, Path], dtype: torch.dtype) -> None:
    for tokens in (5, 1, 40):
        check(lenient[0], dtype, tokens)


def test_rows_that_are_no_rows_are_copied(lenient: tuple[Operators, Path]) -> None:
    x = torch.randn(32, 6).t()
    (have,) = lenient[0]("rms_norm", [x], [None], [1e-5])
    torch.testing.assert_close(have, FORMULAS["rms_norm"](x, None, 1e-5))


def test_what_was_recorded_serves_strictly(lenient: tuple[Operators, Path], tmp_path: Path) -> None:
    check(lenient[0], torch.float32, 5)
    recorded = [g for g in read_recorded(lenient[1]) if "float32" in g.text]
    report = compile_graphs(recorded, ["cpu"], out=tmp_path, jobs=1).bundles[0]
    settings = ServeSettings(bundle=report.path)
    strict = Operators(Server(settings, FACTS, bundle=report.path, digest=report.digest))
    check(strict, torch.float32, 3)
    with pytest.raises(MissingGraph, match="the server rows torch.float32"):
        strict("rms_norm", [torch.randn(3, 16)], [None], [1e-6])


def test_the_key_says_what_the_kernel_depends_on_and_no_more() -> None:
    def key(x: torch.Tensor, weight: torch.Tensor | None = None, epsilon: float = 1e-6) -> str:
        return key_text("rms_norm", [x], [weight], [epsilon])

    plain = key(torch.ones(3, 8))
    assert plain == key(torch.ones(9, 8)) == key(torch.ones(1, 16)[:, :8])
    others = [key(torch.ones(3, 4)), key(torch.ones(3, 8).double()), key(torch.ones(3, 16)[:, :8]), key(torch.ones(3, 8), epsilon=1e-5)]
    assert len({plain, *others, key(torch.ones(3, 8), torch.ones(8))}) == 6


def test_without_a_bundle_nothing_is_strict() -> None:
    with pytest.raises((FlagtreeError, ValueError)):
        ServeSettings(strict="start")
