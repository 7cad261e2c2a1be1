"""`flagtree.load`: bundles as callables without a compiler, trust before code, each promise checked with the tensor's name."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

import flagtree
from flagtree.artifact.bundle import write_bundle
from flagtree.artifact.store import Store
from flagtree.artifact.trust import record_built
from flagtree.errors import BindError, BundleError, StoreError, UntrustedBundle
from flagtree.runtime import cpu
from flagtree.runtime.load import LoadedBundle, Part

Build = Callable[..., tuple[dict, bytes]]

STEP = """
program step
  symbol s0 in 1..8 from dim x 0
  symbol c in 8..64 multiple 8 from dim cache 1
  buffer x: f32[s0, 4] input
  buffer pos: i64[] input
  buffer cache: f32[s0, c, 4] state
  buffer embed.weight: f32[4, 4] weight
  buffer scale: f32[4] weight
  buffer table: f32[c] constant
  buffer h: f32[s0, 4] temp
  buffer y: f32[s0, 4] temp
  kernel write {i0 < s0, i1 < 4}
    v0: f32 = load x[i0, i1]
    v1: f32 = load scale[i1]
    v2: i64 = load pos[]
    v3: f32 = mul v0, v1
    store cache[i0, v2, i1] = v3
    store h[i0, i1] = v3
  extern out: (y) = aten.linear.default(h, embed.weight, none) reason "gemm"
  outputs y
"""
BODIES = {
    "write": "float *x = b[0], *s = b[1], *cache = b[3], *h = b[4]; int64_t pos = *(int64_t *)b[2];"
    " for (int64_t i = 0; i < n[0]; i++) for (int j = 0; j < 4; j++) h[4 * i + j] = cache[(i * n[1] + pos) * 4 + j] = x[4 * i + j] * s[j];"
}


@dataclass(frozen=True)
class Kernel:
    digest: str
    tier: str = "binary"
    missing: str = ""
    files: dict[str, bytes] = field(default_factory=lambda: {"kernel.cpp": b"//\n"})
    launch: dict[str, object] = field(default_factory=dict)
    facts: dict[str, object] = field(default_factory=dict)


Write = Callable[..., str]


@pytest.fixture
def write(build: Build) -> Write:
    def make(path: Path, text: str = STEP, bodies: dict[str, str] = BODIES, **changes: object) -> str:
        launch, library = build(text.replace("f32[c] constant", "f32[64] constant"), bodies)
        arguments: dict[str, object] = {
            "name": "toy",
            "target": "cpu",
            "parts": {"decode": launch},
            "kernels": [Kernel(s["kernel"]) for s in launch["steps"] if "kernel" in s],
            "libraries": {cpu.levels()[-1]: library},
            "constants": {"table": torch.arange(64.0)},
        }
        return write_bundle(path, **{**arguments, **changes})  # type: ignore[arg-type]

    return make


@pytest.fixture
def part(write: Write, tmp_path: Path) -> Part:
    return flagtree.load(tmp_path / "toy", trust=write(tmp_path / "toy")).parts["decode"]


def weights() -> dict[str, torch.Tensor]:
    return {"embed.weight": torch.randn(4, 4), "scale": torch.randn(4)}


def inputs(batch: int = 2, context: int = 16, pos: int = 3) -> dict[str, torch.Tensor]:
    return {"x": torch.randn(batch, 4), "pos": torch.tensor(pos), "cache": torch.zeros(batch, context, 4)}


# -- running ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("form", ["größe mit blank", "toy.ftb"])
def test_a_bundle_runs_and_writes_its_states_in_place(write: Write, tmp_path: Path, form: str) -> None:
    loaded = flagtree.load(tmp_path / form, trust=write(tmp_path / form), threads=1)
    assert isinstance(loaded, LoadedBundle)
    part = loaded.parts["decode"]
    bound = part.bind(w := weights())
    for batch, context, pos in ((1, 8, 0), (8, 64, 63), (3, 16, 5), (3, 40, 35), (3, 16, 7)):
        given = inputs(batch, context, pos)
        for run in (bound, lambda t: part({**w, **t})):
            given["cache"].zero_()
            out = run(given)
            h = given["x"] * w["scale"]
            assert list(out) == ["y"]
            torch.testing.assert_close(out["y"], h @ w["embed.weight"].t())
            expected = torch.zeros(batch, context, 4)
            expected[:, pos] = h
            torch.testing.assert_close(given["cache"], expected)


def test_what_a_part_tells(part: Part) -> None:
    assert part.inputs == {"x": "f32[s0, 4]", "pos": "i64[]"}
    assert part.states == {"cache": "f32[s0, c, 4]"}
    assert part.weights == {"embed.weight": "f32[4, 4]", "scale": "f32[4]"}
    assert part.outputs == ("y",)
    assert [(e.callee, e.reason, e.count) for e in part.externs] == [("aten.linear.default", "gemm", 1)]


def test_parameters_need_no_gradient_and_results_have_none(part: Part) -> None:
    w = {n: torch.nn.Parameter(t) for n, t in weights().items()}
    out = part.bind(w)(inputs())
    assert not out["y"].requires_grad


def test_other_weights_on_the_next_call(part: Part) -> None:
    one, two, given = weights(), weights(), inputs()
    for w in (one, two, one):
        torch.testing.assert_close(part({**w, **given})["y"], (given["x"] * w["scale"]) @ w["embed.weight"].t())


# -- promises --------------------------------------------------------------------------------------------------------
BROKEN: dict[str, tuple[Callable[[dict], object], str]] = {
    "missing": (lambda t: t.pop("x"), "missing: x"),
    "closest": (lambda t: t.update(caches=t.pop("cache")), r"unknown: caches \(did you mean cache\?\)"),
    "extra": (lambda t: t.update(bias=torch.ones(1)), "unknown: bias"),
    "no tensor": (lambda t: t.update(x=[1.0]), "x must be a tensor"),
    "type": (lambda t: t.update(x=t["x"].double()), r"x has the wrong element type.*\n.*torch\.float64 instead of torch\.float32"),
    "rank": (lambda t: t.update(x=t["x"][0]), "x has the wrong rank"),
    "static size": (lambda t: t.update(x=torch.ones(2, 5)), r"x has the wrong size\n  where: dimension 1\n  why: 5 instead of 4"),
    "symbol twice": (lambda t: t.update(cache=torch.zeros(3, 16, 4)), r"cache has the wrong size\n.*0\n  why: 3 instead of 2 \(s0 = 2\)"),
    "range": (lambda t: t.update(x=torch.ones(9, 4), cache=torch.zeros(9, 16, 4)), r"s0 = 9 is out of range\n  where: dim 0 of x"),
    "empty": (lambda t: t.update(x=torch.ones(0, 4), cache=torch.zeros(0, 16, 4)), "s0 = 0 is out of range"),
    "multiple": (lambda t: t.update(cache=torch.zeros(2, 12, 4)), "c = 12 is not a multiple of 8"),
    "strides": (lambda t: t.update(x=torch.ones(4, 2).t()), r"x has the wrong strides(.|\n)*x\.contiguous\(\)"),
    "device": (lambda t: t.update(x=t["x"].to("meta")), "x is not a plain tensor in main memory"),
    "sparse": (lambda t: t.update(x=t["x"].to_sparse()), "x is not a plain tensor in main memory"),
    "lazy": (lambda t: t.update(x=torch._neg_view(t["x"])), "x is a lazy view"),
    "overlap": (lambda t: t.update(x=t["cache"][0, :2]), "share memory"),
    "overlap with a weight": (lambda t: t.update(cache=torch.as_strided(_SHARED, (2, 16, 4), (64, 4, 1))), "share memory"),
}
_SHARED = torch.zeros(200)


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize("warm", [False, True])
def test_every_broken_promise_names_the_tensor(part: Part, case: str, warm: bool) -> None:
    spoil, message = BROKEN[case]
    bound = part.bind({**weights(), "scale": _SHARED[:4]})
    if warm:
        bound(inputs())
    given = inputs()
    spoil(given)
    with pytest.raises(BindError, match=message) as caught:
        bound(given)
    assert caught.value.exit_code == 2


def test_strides_of_dimensions_of_one_do_not_matter(part: Part) -> None:
    given = inputs(batch=1)
    given["x"] = torch.randn(4, 1).t()
    assert given["x"].stride() == (1, 1)
    part.bind(weights())(given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": torch.ones(5)}, r"scale has the wrong size(.|\n)*5 instead of 4"),
        ({"embed.weight": torch.ones(4, 4).bfloat16()}, r"embed\.weight has the wrong element type"),
        ({"embed.weight": torch.arange(16.0).reshape(4, 4).t()}, r"embed\.weight has the wrong strides"),
        ({"embed_weight": torch.ones(4, 4)}, "unknown: embed_weight"),
    ],
)
def test_weights_are_checked_when_they_are_bound(part: Part, change: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(BindError, match=message):
        part.bind({**weights(), **change})
    with pytest.raises(BindError, match=message):
        part({**weights(), **change, **inputs()})
    with pytest.raises(BindError, match=r"missing: embed\.weight"):
        part.bind({"scale": torch.ones(4)})


# -- trust, targets, damage ------------------------------------------------------------------------------------------
def test_trust_is_asked_before_code_is_mapped(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = write(tmp_path / "toy")
    mapped: list[int] = []
    monkeypatch.setattr(cpu, "load_library", lambda *_: mapped.append(1))
    with pytest.raises(UntrustedBundle, match=f"trust='{digest}'"):
        flagtree.load(tmp_path / "toy")
    with pytest.raises(UntrustedBundle):
        flagtree.load(tmp_path / "toy", trust="0" * 64)
    assert not mapped
    monkeypatch.undo()
    monkeypatch.setenv("FLAGTREE_CACHE_DIR", str(tmp_path / "store"))
    record_built(digest, Store())
    flagtree.load(tmp_path / "toy")


def test_an_edited_library_is_never_mapped(write: Write, tmp_path: Path) -> None:
    digest = write(tmp_path / "toy")
    (library,) = (tmp_path / "toy" / "lib").iterdir()
    data = bytearray(library.read_bytes())
    data[len(data) // 2] ^= 1
    library.write_bytes(bytes(data))
    with pytest.raises(BundleError, match="damaged or was edited"):
        flagtree.load(tmp_path / "toy", trust=digest)


def test_a_bundle_for_another_target_or_cpu(write: Write, tmp_path: Path) -> None:
    digest = write(tmp_path / "chip", target="chip:c1", libraries={})
    with pytest.raises(BundleError, match=r"for chip:c1(.|\n)*flagtree targets"):
        flagtree.load(tmp_path / "chip", trust=digest)
    digest = write(tmp_path / "cpu", libraries={"x86-64-v9": b"?"})
    with pytest.raises(BundleError, match=r"no code for this CPU(.|\n)*x86-64-v9"):
        flagtree.load(tmp_path / "cpu", trust=digest)


def test_a_library_that_is_none_or_lacks_a_kernel(write: Write, build: Build, tmp_path: Path) -> None:
    level = cpu.levels()[-1]
    digest = write(tmp_path / "none", libraries={level: b"no library"})
    with pytest.raises(StoreError, match="cannot map"):
        flagtree.load(tmp_path / "none", trust=digest)
    _, other = build(STEP.replace("mul v0, v1", "sub v0, v1"), BODIES)
    digest = write(tmp_path / "other", libraries={level: other})
    with pytest.raises(BundleError, match="lacks the kernel"):
        flagtree.load(tmp_path / "other", trust=digest)


def test_an_operator_that_this_torch_lacks(write: Write, tmp_path: Path) -> None:
    digest = write(tmp_path / "toy", STEP.replace("aten.linear.default", "aten.linear_of_tomorrow.default"))
    with pytest.raises(BundleError, match=r"no operator 'aten\.linear_of_tomorrow\.default'(.|\n)*update torch"):
        flagtree.load(tmp_path / "toy", trust=digest)


# -- the CPU ---------------------------------------------------------------------------------------------------------
def test_the_best_level_is_taken() -> None:
    levels = cpu.levels()
    assert cpu.best_level(["x86-64-v9", *levels]) == levels[0]
    assert cpu.best_level([levels[-1]]) == levels[-1]
    if levels[0].startswith("x86"):
        capability = torch.backends.cpu.get_cpu_capability()
        assert ("x86-64-v4" in levels) == (capability == "AVX512")
        assert ("x86-64-v3" in levels) == (capability in ("AVX2", "AVX512"))


def test_the_same_bytes_are_mapped_once_and_others_apart(build: Build) -> None:
    _, one = build(STEP, BODIES)
    _, two = build(STEP, {"write": "((float *)b[4])[0] = 7;"})
    a, b = cpu.load_library(one), cpu.load_library(two)
    assert cpu.load_library(bytes(one)) is a
    assert a is not b


def test_libraries_beyond_the_limit_of_open_files(build: Build) -> None:
    """A program that compiles thousands of graphs holds no descriptor for any, and none is taken for an earlier one."""
    _, library = build(STEP, BODIES)
    before = len(os.listdir("/proc/self/fd"))
    mapped = [cpu.CpuLibrary(library + bytes([k]), "here") for k in range(60)]  # bytes after the end of an object mean nothing
    assert len(os.listdir("/proc/self/fd")) == before
    assert len({one.shared._handle for one in mapped}) == len(mapped)


def test_without_memory_files_the_cache_folder_serves(build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, library = build(STEP, BODIES)
    monkeypatch.setenv("FLAGTREE_CACHE_DIR", str(tmp_path / "größe mit blank"))
    monkeypatch.delattr(os, "memfd_create")
    cpu.CpuLibrary(library, "here")
    assert list((tmp_path / "größe mit blank").iterdir()) == []
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("FLAGTREE_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(StoreError, match="FLAGTREE_CACHE_DIR"):
        cpu.CpuLibrary(library, "here")


def test_one_openmp_runtime_in_the_process(build: Build) -> None:
    text = "program p\n  buffer y: i64[1] input\n  kernel k {i0 < 1}\n    v0: i64 = load y[i0]\n    store y[i0] = v0\n  outputs y\n"
    body = "int64_t *y = b[0]; int t = 0;\n#pragma omp parallel reduction(+:t)\n t += 1;\n y[0] = t;"
    launch, library = build(text, {"k": body})
    from flagtree.runtime.launch import Executable

    run = Executable(launch, cpu.load_library(library))
    before = torch.get_num_threads()
    for count in (1, 2):
        torch.set_num_threads(count)
        assert run.call([torch.zeros(1, dtype=torch.int64)])[0].item() == count
    torch.set_num_threads(before)
    with open("/proc/self/maps", encoding="utf-8") as maps:
        assert len({line.split()[-1] for line in maps if "libgomp" in line or "libomp" in line}) == 1


# -- without any compiler --------------------------------------------------------------------------------------------
ALONE = """
import json, sys

class Refuse:
    banned = {"sympy", "networkx", "jinja2", "triton", "transformers", "numpy.f2py"}
    ours = {f"flagtree.{n}" for n in ("capture", "ir", "lower", "passes", "codegen", "toolchain", "cli")}
    def find_spec(self, name, path=None, target=None):
        if any(name == o or name.startswith(o + ".") for o in self.ours):
            raise ImportError(f"the runtime imports {name}")
        if name.split(".")[0] in self.banned:
            import traceback
            callers = [f.filename for f in traceback.extract_stack()[:-1] if "importlib" not in f.filename]
            # torch may import what it likes; what stands directly above the import machinery is who asks
            if "flagtree" in callers[-1]:
                raise ImportError(f"flagtree imports {name}")

sys.meta_path.insert(0, Refuse())
import flagtree, torch
torch.manual_seed(1)
path, digest = sys.argv[1:3]
part = flagtree.load(path, trust=digest).parts["decode"]
w = {"embed.weight": torch.randn(4, 4), "scale": torch.randn(4)}
t = {"x": torch.randn(2, 4), "pos": torch.tensor(3), "cache": torch.zeros(2, 16, 4)}
y = part.bind(w)(t)["y"]
assert torch.allclose(y, (t["x"] * w["scale"]) @ w["embed.weight"].t(), atol=1e-6)
print(json.dumps(sorted(m for m in sys.modules if m.startswith("flagtree"))))
"""


def test_a_bundle_runs_where_no_compiler_can_be_reached(write: Write, tmp_path: Path, repository: Path) -> None:
    digest = write(tmp_path / "built" / "toy")
    shutil.move(tmp_path / "built", tmp_path / "anderswo, weit weg")
    (tmp_path / "empty").mkdir()
    env = {"PATH": str(tmp_path / "empty"), "HOME": str(tmp_path / "home"), "PYTHONPATH": str(repository)}
    command = [sys.executable, "-c", ALONE, str(tmp_path / "anderswo, weit weg" / "toy"), digest]
    run = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "flagtree.runtime.load" in json.loads(run.stdout)
    assert not (tmp_path / "home").exists()
