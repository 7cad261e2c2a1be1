"""The launcher over a recording driver: what reaches CUDA's, HIP's and MACA's functions, through C and through ctypes alone.

No kernel runs: the driver records.  tests/runtime/test_gpu_execute.py runs kernels through the same launcher.
"""

from __future__ import annotations

import itertools
import threading
from array import array
from pathlib import Path

import pytest
import torch

from flagtree.errors import BindError, BundleError, DeviceError
from flagtree.runtime import launcher
from flagtree.runtime.launch import Executable
from tests.runtime.stand_in import ROUTES, TARGETS, Recording, StandIn, Toy, compile_launcher, kinds_of, toy

CHAIN = """
program chain
  symbol s0 in 0..4096 from dim x 0
  symbol far in 0..8589934592 from scalar k
  symbol even in 0..4096 multiple 16 from stride z 0
  buffer k: i64[] scalar
  buffer x: f32[s0, 8] input
  buffer z: f32[s0, 8] input strides(even, 1)
  buffer t: f32[s0, 8] temp
  buffer y: f32[s0, 8] temp
  kernel one {i0 < s0, i1 < 8}
    v0: f32 = load x[i0, i1]
    v1: f32 = load z[i0, i1]
    v2: i64 = index far
    v3: f32 = cast v2
    v4: f32 = add v0, v1
    v5: f32 = add v4, v3
    store t[i0, i1] = v5
  kernel two {i0 < s0, i1 < 8}
    v0: f32 = load t[i0, i1]
    v1: f32 = neg v0
    store y[i0, i1] = v1
  outputs y
"""
GRIDS = {"one": [["//", ["+", "n0", 3], 4], 1, ["+", ["%", "n0", 7], 1]], "two": ["n0", 2, 1]}


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_launcher(tmp_path_factory.mktemp("launcher"))


class Bench:
    """A toy program on a stand-in device of one target, through one route."""

    def __init__(self, target: str, route: str, compiled: Path, folder: Path, made: Toy) -> None:
        self.recording, self.toy = Recording(target, folder), made
        for record in made.records.values():
            self.recording.describe(record["function"], kinds_of(record))
        self.device = StandIn(self.recording.driver, route, compiled)
        self.run = Executable(made.launch, made.library(self.device))
        self.history = self.recording.lines("load", "function")

    def call(self, rows: int, far: int = 5, *, z: torch.Tensor | None = None, x: torch.Tensor | None = None) -> torch.Tensor:
        x = torch.zeros(rows, 8) if x is None else x
        z = torch.zeros(rows, 16)[:, :8] if z is None else z
        self.tensors = (x, z)
        return self.run.call([far, x, z])[0]

    def launches(self) -> list[list[str]]:
        return [line.split() for line in self.recording.lines("launch")]


@pytest.fixture(params=list(itertools.product(TARGETS, ROUTES)), ids="-".join)
def bench(request: pytest.FixtureRequest, compiled: Path, tmp_path: Path) -> Bench:
    target, route = request.param
    return Bench(target, route, compiled, tmp_path, toy(CHAIN, GRIDS))


@pytest.fixture(params=ROUTES)
def cuda(request: pytest.FixtureRequest, compiled: Path, tmp_path: Path) -> Bench:
    return Bench("cuda:sm90", request.param, compiled, tmp_path, toy(CHAIN, GRIDS))


def words(line: list[str], kind: str) -> list[str]:
    return [w.partition(":")[2] for w in line if w.startswith(f"{kind}:")]


def test_what_a_launch_passes(bench: Bench) -> None:
    bench.device.stream = 0xABC
    far = (1 << 33) - 7
    y = bench.call(21, far)
    one, two = bench.launches()
    assert one[2:14] == ["grid", "6", "1", "1", "block", "128", "1", "1", "shared", "0", "stream", "abc"][:12]
    x, z = bench.tensors
    pointers = words(one, "ptr")
    order = list(bench.toy.isolated["one"][0].buffers)
    assert [pointers[order.index("x")], pointers[order.index("z")]] == [f"{x.data_ptr():x}", f"{z.data_ptr():x}"]
    assert sorted(words(one, "i32")) == ["16", "21"]
    assert words(one, "i64") == [str(far)]
    assert one[-2:] == two[-2:] == ["null", "null"]
    assert "not-null" not in one
    # the second kernel reads what the first wrote, writes what the caller gets, and takes the grid of its own expression
    out = bench.toy.isolated["two"][0].buffers
    assert words(two, "ptr")[out.index("y")] == f"{y.data_ptr():x}"
    assert words(two, "ptr")[out.index("t")] == pointers[order.index("t")]
    assert two[3:6] == ["21", "2", "1"]


def test_python_and_c_have_the_same_grid(compiled: Path, tmp_path: Path) -> None:
    """Floor division and remainder of negative numbers too: both routes evaluate one code."""
    text = CHAIN.replace("symbol far in 0..8589934592", "symbol far in -8589934592..8589934592")
    for number, (a, b) in enumerate(((4, -3), (-7, 5), (9, 8))):
        expression = ["+", ["*", ["//", ["+", "n1", a], b], ["%", "n1", b]], ["%", ["*", "n1", a], 7], 5000]
        made = toy(text, {"one": [expression, 1, 1], "two": GRIDS["two"]})
        names = made.isolated["one"][0].symbols
        for far in (-1000, -1, 0, 1, 12345):
            seen = set()
            for route in ROUTES:
                bench = Bench("cuda:sm90", route, compiled, _fresh(tmp_path, f"{number}{far}{route}"), made)
                bench.call(3, far)
                seen.add(bench.launches()[0][3])
            value = [3, far, 16][["s0", "far", "even"].index(str(names[1]))]
            assert seen == {str((value + a) // b * (value % b) + value * a % 7 + 5000)}


def _fresh(folder: Path, name: str) -> Path:
    path = folder / name
    path.mkdir()
    return path


def test_an_empty_grid_is_no_launch(bench: Bench) -> None:
    assert bench.call(0).shape == (0, 8)
    assert bench.launches() == []


def launched(bench: Bench) -> list[str]:
    """The launches as "kernel file", traced back through the functions and modules that the driver gave out."""
    names = {function: kernel for kernel, function in bench.toy.functions().items()}
    out = []
    for launch in bench.launches():
        _, function, _, module, *_ = next(line.split() for line in bench.history if line.endswith(f"-> {launch[1]}"))
        _, image, *_ = next(line.split() for line in bench.history if line.startswith("load") and line.endswith(f"-> {module}"))
        out.append(f"{names[function]} {image.split('/')[1]}")
    return out


def test_the_variant_is_chosen_by_looking(bench: Bench) -> None:
    bench.call(4)
    assert launched(bench) == ["one aligned.bin", "two aligned.bin"]
    # a pointer of 4 or 8 bytes more: the kernel that takes it is generic, the other one stays aligned, and it comes back
    odd, even = (torch.zeros(4 * 8 + k)[k:].view(4, 8) for k in (1, 2))
    for given, expected in ((odd, "generic.bin"), (None, "aligned.bin"), (even, "generic.bin"), (None, "aligned.bin")):
        bench.recording.forget()
        bench.call(4, x=given)
        assert launched(bench) == [f"one {expected}", "two aligned.bin"]


def test_a_symbol_that_does_not_divide(cuda: Bench) -> None:
    """The caller's range promises that `even` is a multiple of 16; the launcher looks at its value all the same."""
    alone, digest = cuda.toy.isolated["one"]
    record = cuda.toy.library(cuda.device).kernel(digest)
    place = [str(s) for s in alone.symbols].index("even")
    assert f"n{place}" in cuda.toy.records[digest]["variants"]["aligned"]["requires"]
    block, numbers = array("Q", [0x1000] * record.pointers), array("q", [32] * record.symbols)
    run = cuda.device.route.run([(record, block.buffer_info()[0], numbers.buffer_info()[0])], 0, lambda r, c: AssertionError(c))
    for value, expected in ((32, "aligned.bin"), (8, "generic.bin"), (-16, "aligned.bin")):
        cuda.recording.forget()
        numbers[place] = value
        run()
        assert launched(cuda) == [f"one {expected}"]


def test_no_variant_that_fits_is_an_error(compiled: Path, tmp_path: Path) -> None:
    for route in ROUTES:
        bench = Bench("cuda:sm90", route, compiled, _fresh(tmp_path, route), toy(CHAIN, GRIDS, variants=["aligned"]))
        with pytest.raises(DeviceError, match=r"not launched(.|\n)*no generic one"):
            bench.call(4, x=torch.zeros(33)[1:].view(4, 8))
        bad = Bench("cuda:sm90", route, compiled, _fresh(tmp_path, f"{route}-bad"), toy(CHAIN, {**GRIDS, "one": [["//", 1, "n0"], 1, 1]}))
        with pytest.raises(DeviceError, match="the grid is no size"):
            bad.call(0)
        low = Bench("cuda:sm90", route, compiled, _fresh(tmp_path, f"{route}-low"), toy(CHAIN, {**GRIDS, "one": [["+", "n0", -9], 1, 1]}))
        with pytest.raises(DeviceError, match="the grid is no size"):
            low.call(4)


def test_modules_are_loaded_once_and_before_any_call(bench: Bench) -> None:
    loads = bench.recording.lines("load", "function")
    assert len(loads) == 2 * 2 * 2  # two kernels, two variants: a module and its function each
    Executable(bench.toy.launch, bench.toy.library(bench.device))  # another library of the same device: the same modules
    for rows in (3, 4, 3):
        bench.call(rows)
    assert bench.recording.lines("load", "function") == loads


def test_each_device_loads_its_own(compiled: Path, tmp_path: Path) -> None:
    made = toy(CHAIN, GRIDS)
    for route, target in itertools.product(ROUTES, TARGETS):
        first = Bench(target, route, compiled, _fresh(tmp_path, f"{route}{target}".replace(":", "")), made)
        second = StandIn(first.recording.driver, route, compiled, ordinal=1)
        other = Executable(made.launch, made.library(second))
        places = {line.split()[3] for line in first.recording.lines("load")}
        assert places == ({"c0", "c1"} if first.recording.has_contexts else {"0", "1"})
        for run in (first.run, other, first.run, other):  # the recording driver refuses a launch in the wrong place
            run.call([1, torch.zeros(2, 8), torch.zeros(2, 16)[:, :8]])
        assert len(first.launches()) == 8


def test_shared_memory_is_asked_for_once_at_load(compiled: Path, tmp_path: Path) -> None:
    for route in ROUTES:
        bench = Bench("cuda:sm90", route, compiled, _fresh(tmp_path, route), toy(CHAIN, GRIDS, shared=100_000))
        asked = bench.recording.lines("set_attribute")
        assert len(asked) == 4
        assert all(line.split()[2:] == ["8", "100000"] for line in asked)
        for _ in range(3):
            bench.call(4)  # the driver refuses a launch that was not allowed as much
        assert bench.recording.lines("set_attribute") == asked
        assert {launch[launch.index("shared") + 1] for launch in bench.launches()} == {"100000"}
        small = Bench("cuda:sm90", route, compiled, _fresh(tmp_path, f"{route}-s"), toy(CHAIN, GRIDS, shared=49152))
        small.call(4)
        assert small.recording.lines("set_attribute") == []


@pytest.mark.parametrize("role", ["load", "function", "set_attribute"])
def test_a_refusal_at_load_names_kernel_and_code(role: str, compiled: Path, tmp_path: Path) -> None:
    recording, made = Recording("cuda:sm90", tmp_path), toy(CHAIN, GRIDS, shared=100_000)
    device = StandIn(recording.driver, "compiled", compiled)
    recording.refuse(role, 209)
    with pytest.raises(DeviceError) as caught:
        Executable(made.launch, made.library(device))
    assert made.functions()["one"] in caught.value.where
    assert caught.value.why == "code 209, NO_BINARY_FOR_GPU"
    assert recording.driver.facts.symbols[role] in caught.value.what
    Executable(made.launch, made.library(device))  # the next attempt is not spoiled


def test_a_refusal_at_launch_names_kernel_and_code(bench: Bench) -> None:
    bench.recording.refuse("launch", 209)
    with pytest.raises(DeviceError) as caught:
        bench.call(4)
    assert bench.toy.functions()["one"] == caught.value.where
    assert caught.value.why == "code 209, NO_BINARY_FOR_GPU"
    bench.recording.forget()
    bench.call(4)
    assert len(bench.launches()) == 2


def test_each_stream_has_its_own_frame(cuda: Bench) -> None:
    temps = []
    for stream in (1, 2, 1, 2):
        cuda.device.stream = stream
        cuda.recording.forget()
        cuda.call(4)
        one = cuda.launches()[0]
        assert one[one.index("stream") + 1] == str(stream)
        temps.append(words(one, "ptr")[cuda.toy.isolated["one"][0].buffers.index("t")])
    assert temps[:2] == temps[2:]
    assert temps[0] != temps[1]


def test_a_captured_call_shares_no_memory_with_later_calls(cuda: Bench) -> None:
    """A graph replays after the call: its temps must not be those of a frame that another call takes, nor be kept for one."""
    kept = cuda.run._session._frames
    cuda.call(4)
    before = dict(kept)
    cuda.device.captures = True
    cuda.call(4)
    assert kept == before
    temps = [words(line, "ptr")[cuda.toy.isolated["one"][0].buffers.index("t")] for line in cuda.launches()[::2]]
    assert temps[0] != temps[1]
    cuda.device.captures = False
    cuda.recording.forget()
    cuda.call(4)
    assert cuda.recording.lines("load", "function", "set_attribute") == []


def test_two_threads(bench: Bench) -> None:
    """Each thread makes the device current for itself, and no launch reads another's addresses."""
    errors: list[BaseException] = []

    def work(rows: int) -> None:
        try:
            for _ in range(50):
                x = torch.zeros(rows, 8)
                bench.run.call([rows, x, torch.zeros(rows, 16)[:, :8]])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(rows,)) for rows in (5, 6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
    launches = bench.launches()
    assert len(launches) == 200
    for one in launches:
        if words(one, "i64"):
            assert words(one, "i64")[0] in words(one, "i32")  # `far` is what `rows` is
    assert "not-null" not in str(launches)


def test_another_context_comes_back(bench: Bench) -> None:
    if not bench.recording.has_contexts:
        pytest.skip("devices are set by number")
    bench.recording.driver.call("set_current", 0xF00)
    bench.call(4)
    assert bench.recording.lines("set_current")[-2:] == ["set_current c0", "set_current f00"]
    assert len(bench.launches()) == 2


@pytest.mark.parametrize("change", [
    {"threads": 0}, {"grid": [1, 1]}, {"grid": ["m", 1, 1]}, {"grid": [["**", 1, 2], 1, 1]}, {"signature": [["n0", "fp32"]]},
    {"signature": [["n0", "i32"], ["b0", "*fp32"]]}, {"variants": {"a": {"file": "f", "requires": [], "shared": -1, "null_pointers": 2}}},
    {"variants": {"a": {"file": "f", "requires": [], "shared": 0, "null_pointers": 9}}}, {"variants": None},
])  # fmt: skip
def test_a_bad_launch_record_is_one_error(change: dict) -> None:
    good = next(iter(toy(CHAIN, GRIDS).records.values()))
    launcher.read_record(good, lambda *_: 1)
    with pytest.raises(BundleError, match="launch record is not valid"):
        launcher.read_record({**good, **change}, lambda *_: 1)


def test_a_kernel_that_is_not_there(cuda: Bench) -> None:
    from flagtree.runtime.gpu import GpuLibrary

    with pytest.raises(BundleError, match="lacks the kernel"):
        Executable(cuda.toy.launch, GpuLibrary(cuda.device, {}, lambda digest, file: b""))


def test_a_launcher_of_another_version_is_refused(compiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "VERSION", 2)
    with pytest.raises(DeviceError, match=r"another version(.|\n)*launcher_build"):
        launcher.Compiled(compiled, 0)


def test_promises_are_still_checked(cuda: Bench) -> None:
    with pytest.raises(BindError, match="out of range"):
        cuda.call(4, far=1 << 40)
