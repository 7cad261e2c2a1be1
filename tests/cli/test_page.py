"""`flagtree inspect --html`: one page that needs nothing else, shows what the bundle says, and runs nothing that the bundle says."""

from __future__ import annotations

import json
import re
import shutil
import struct
import subprocess
import zlib
from dataclasses import replace
from html import unescape
from pathlib import Path

import pytest

from flagtree.artifact.bundle import write_bundle
from flagtree.cli.page import operations
from flagtree.cli.page_plots import Point, roofline, traffic
from flagtree.ir.program import Kernel
from flagtree.ir.text import parse_program
from flagtree.targets import find_target
from tests.cli.conftest import Flagtree
from tests.cli.reports import report
from tests.cli.test_bundle_commands import DIGEST, LAUNCH, Built

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HOSTILE = "</pre><script>document.title = 'owned'</script><img src=http://example.invalid/x onerror=alert(1)>"
IR = """program isolated
  symbol n0 in 1..64 from argument
  buffer b0: f32[n0, 8] input
  buffer b1: f32[n0] temp
  kernel k {i0 < n0} reduce {r0 < 8} numerics(eager, contract=off, acc=f32)
    v0: f32 = load b0[i0, r0]
    v1: f32 = mul v0, v0
    v2: f32 = sum v1 over r0
    v3: f32 = sqrt v2
    store b1[i0] = v3
  outputs b1
"""


def page(flagtree: Flagtree, tmp_path: Path, target: str = "cuda:sm90", name: str = "qwen3") -> str:
    """The page of a small bundle whose source, names and reasons are hostile."""
    launch = json.loads(json.dumps(LAUNCH))
    launch["symbols"] = [{"name": "batch", "min": 1, "max": 64, "multiple": 1, "source": ["dim", "x", 0]}]
    kernel, extern = launch["steps"][0]["steps"]
    kernel["symbols"], extern["reason"] = ["batch"], HOSTILE
    part = report().bundles[0].parts[0]
    part = replace(part, kernels=tuple(replace(row, digest=DIGEST) for row in part.kernels[:1]), reference={"batch": 4})
    files = {"kernel.py": f"# {HOSTILE}\n".encode(), "kernel.ir": IR.encode(), "aligned.ptx": b".version 8.2\n"}
    runs = [{"inputs": {}, "outputs": {"b1": {"max_ulp": 0.5, "equal_to_eager": 0.98, "gate": "stated error"}}}]
    record = {"verdict": "pass", "eager": "compared", "executed": ["maca-ir (emulated)"], "ops": ["aten.mul.Tensor"], "runs": runs}
    write_bundle(tmp_path / "bundle", name=name, target=target, parts={"prefill": launch}, kernels=[Built(files=files)],
                 coverage={"prefill": {"report": part.to_dict(), "refused": ["k3 + k5: cycle through k4"]}},
                 certificate={"form": "long", "versions": {"torch": "2.13"}, "kernels": {DIGEST: record}})  # fmt: skip
    out = tmp_path / "größe und blank.html"
    ended = flagtree("inspect", str(tmp_path / "bundle"), "--html", str(out))
    assert (ended.code, ended.out.strip()) == (0, str(out)), ended.err
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    return out.read_text(encoding="utf-8")


def test_the_page_shows_what_the_bundle_says(flagtree: Flagtree, tmp_path: Path) -> None:
    text = unescape(re.sub(r"<[^>]+>", " ", page(flagtree, tmp_path).replace(HOSTILE, "")))
    for fact in ("36 times, a layer each", "add_rms_norm", "aten.linear.default", "k3 + k5: cycle through k4", ".version 8.2",
                 "program isolated", "pass", "0.5 ULP", "98.0% of the elements", "operations a byte", "H100 SXM"):  # fmt: skip
        assert fact in text, fact


def test_the_page_needs_nothing_and_runs_nothing(flagtree: Flagtree, tmp_path: Path) -> None:
    text = page(flagtree, tmp_path, name=HOSTILE)
    assert "<script" not in text and "<img" not in text and "&lt;script&gt;" in text
    assert not re.findall(r"""<[^>]*(?:src|href|url)=["']?[^#"']""", text)  # in a tag, as what is escaped is not
    assert "default-src 'none'" in text


def test_a_chip_without_public_figures_has_no_roofline_and_says_why(flagtree: Flagtree, tmp_path: Path) -> None:
    assert "no public figure of the memory bandwidth of metax" in page(flagtree, tmp_path, "metax")


def test_a_page_that_cannot_be_written(flagtree: Flagtree, tmp_path: Path) -> None:
    page(flagtree, tmp_path)
    ended = flagtree("inspect", str(tmp_path / "bundle"), "--html", str(tmp_path / "nowhere" / "page.html"))
    assert ended.code == 2 and "nowhere" in ended.err and "--html" in ended.err


def test_operations_are_those_of_the_ir() -> None:
    (kernel,) = parse_program(IR).steps
    assert isinstance(kernel, Kernel)
    assert operations(kernel, {"n0": 3}) == 2 * 3 * 8 + 3  # a product and a sum at each of 24 points, a root a row


def test_a_point_stands_under_the_roof_at_its_operations_a_byte() -> None:
    """Bandwidth 100 B/s, peak 1000 op/s: at 1 op/B a tenth of the peak, so one of four decades below the ridge's right end."""
    svg = roofline([Point("a<b", 10, 10, 100), Point("busy", 10_000, 10, 10)], 100.0, 1000.0)
    dots = {tuple(map(float, found)) for found in re.findall(r'cx="([\d.]+)" cy="([\d.]+)" r="5"', svg)}
    ticks = {label: float(x) for x, label in re.findall(r'<text x="([\d.]+)" y="356" text-anchor="middle" class="small">([\d.e+]+)<', svg)}
    marked = re.findall(r'<text x="84" y="([\d.]+)" text-anchor="end" class="small">([\d.]+ op/s)<', svg)
    rates = {label: float(y) - 4 for y, label in marked}
    assert dots == {(ticks["1"], rates["100 op/s"]), (ticks["1000"], rates["1000 op/s"])}
    assert "a&lt;b" in svg and "a<b" not in svg


def test_bars_are_in_proportion() -> None:
    widths = [float(w) for w in re.findall(r'width="([\d.]+)" height="11"', traffic([("k", 400, 100), ("l", 200, 200)]))]
    assert [round(w / widths[0], 2) for w in widths] == [1.0, 0.25, 0.5, 0.5]


def test_every_figure_of_a_device_names_its_source() -> None:
    for name in ("cuda:sm90", "cuda:sm80", "rocm:gfx942"):
        target = find_target(name)
        assert target.bandwidth > 1e11 and target.peak > 1e13 and {"bandwidth", "peak"} <= set(target.facts_from)


# -- in a browser ----------------------------------------------------------------------------------------------------
def pixels(png: bytes) -> bytes:
    """The filtered rows of a PNG; enough to see that it is no single colour."""
    assert png.startswith(b"\x89PNG")
    data, at = b"", 8
    while at < len(png):
        length, kind = struct.unpack(">I4s", png[at : at + 8])
        data += png[at + 8 : at + 8 + length] if kind == b"IDAT" else b""
        at += length + 12
    return zlib.decompress(data)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed: apt-get install chromium")
def test_a_browser_shows_it_and_runs_nothing_of_it(flagtree: Flagtree, tmp_path: Path) -> None:
    text = page(flagtree, tmp_path)
    (tmp_path / "page.html").write_text(text, encoding="utf-8")
    quiet = ("gpu", "quic", "background-networking", "component-update", "sync")
    flags = ["--headless", "--no-sandbox", "--no-first-run", *(f"--disable-{what}" for what in quiet),
             f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1200,1600"]  # fmt: skip
    shot, address = tmp_path / "shot.png", (tmp_path / "page.html").as_uri()

    def chromium(*more: str) -> str:
        return subprocess.run([str(CHROMIUM), *flags, *more, address], capture_output=True, text=True, timeout=240, check=True).stdout

    document = chromium("--dump-dom")  # after layout and whatever would have run
    assert "<title>qwen3 for cuda:sm90</title>" in document and "owned" not in re.sub(r"&lt;script.*", "", document)
    chromium(f"--screenshot={shot}")
    assert len(set(pixels(shot.read_bytes()))) > 20
