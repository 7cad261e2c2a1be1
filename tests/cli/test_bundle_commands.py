"""`inspect` and `explain` on a real bundle on disk: what they show, and that they refuse a damaged one without a traceback."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from flagtree.artifact.bundle import write_bundle
from flagtree.artifact.trust import record_built
from flagtree.cli.inspect import numbered
from tests.cli.conftest import Flagtree
from tests.cli.reports import SDK, report

DIGEST = "ab" * 32
LAUNCH = {
    "format": 1, "name": "prefill", "symbols": [], "outputs": ["y"],
    "buffers": [{"name": n, "dtype": "bf16", "shape": [4], "strides": None, "role": r, "alias": None}
                for n, r in (("x", "input"), ("w", "weight"), ("y", "temp"))],
    "steps": [{"repeat": 36, "bindings": {}, "steps": [
        {"kernel": DIGEST, "name": "k0", "buffers": ["x", "y"], "symbols": []},
        {"extern": "aten.linear.default", "name": "e0", "args": [], "kwargs": {}, "outputs": ["y"], "mutates": [], "reason": "gemm"}]}],
}


@dataclass(frozen=True)
class Built:
    digest: str = DIGEST
    tier: str = "llir"
    missing: str = SDK
    files: dict[str, bytes] = field(default_factory=lambda: {"kernel.py": b"# readable\n"})
    launch: dict[str, object] = field(default_factory=dict)
    facts: dict[str, object] = field(default_factory=dict)


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLAGTREE_CACHE_DIR", str(tmp_path / "store"))
    path = tmp_path / "größe 1" / "qwen3"
    path.parent.mkdir()
    write_bundle(path, name="qwen3", target="metax", parts={"prefill": LAUNCH}, kernels=[Built()],
                 versions={"flagtree": "0.1.0"}, coverage={"prefill": {"symbols": {}, "refused": ["k3 + k5: cycle through k4"]}},
                 certificate={"kernels": {DIGEST: {"executed": "maca-ir (emulated)", "rms": 0.25}}})
    return path


def test_inspect_shows_what_the_launch_list_tells(flagtree: Flagtree, bundle: Path) -> None:
    ended = flagtree("inspect", str(bundle))
    assert ended.code == 0, ended.err
    for fact in ("36 launches", "36 calls", "1 weights", "1 at tier llir", "mcfatbin", "flagtree 0.1.0", "no; running it needs"):
        assert fact in " ".join(ended.out.split()), fact
    facts = json.loads(flagtree("inspect", str(bundle), "--json").out)
    assert facts["trusted"] is False
    record_built(facts["digest"])
    assert json.loads(flagtree("inspect", str(bundle), "--json").out)["trusted"] is True


def test_numbered_names_are_shown_as_a_range() -> None:
    assert numbered(["ids", "k.0", "k.1", "k.2", "v.0", "v.1", "x1", "x2", "x3"]) == "ids, k.0 to k.2, v.0, v.1, x1, x2, x3"


def test_inspect_shows_the_report_that_the_compiler_stored(flagtree: Flagtree, tmp_path: Path) -> None:
    part = report().bundles[0].parts[0]
    coverage = {"prefill": {"report": json.loads(json.dumps(part.to_dict()))}}
    write_bundle(tmp_path / "b", name="qwen3", target="metax", parts={"prefill": LAUNCH}, kernels=[Built()], coverage=coverage)
    out = flagtree("inspect", str(tmp_path / "b")).out
    for fact in ("add_rms_norm", "352 MB", "67.1 MB", "aten.linear.default", "14 launches"):
        assert fact in out


@pytest.mark.parametrize(
    ("topic", "said"),
    [("extern", "36  aten.linear.default: gemm"), ("fusion", "1 refused\n  k3 + k5: cycle through k4"),
     ("tiers", f"llir; missing: {SDK}"), ("trust", "trust='"), ("certificate", "executed: maca-ir (emulated)")],
)
def test_explain_shows_the_evidence(flagtree: Flagtree, bundle: Path, topic: str, said: str) -> None:
    ended = flagtree("explain", topic, str(bundle))
    assert ended.code == 0, ended.err
    assert said in ended.out


def test_explain_without_a_topic_lists_all_and_each_has_a_text(
    flagtree: Flagtree, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLAGTREE_CACHE_DIR", str(tmp_path / "empty"))  # graphs that a store keeps as refused are listed below a text
    names = {line.split()[0] for line in flagtree("explain").out.splitlines()}
    assert names == {path.stem for path in (repository / "docs" / "explain").glob("*.md")}
    for name in names:
        assert flagtree("explain", name).out == (repository / "docs" / "explain" / f"{name}.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("arguments", [("inspect",), ("explain", "extern")])
def test_a_damaged_bundle_is_refused(flagtree: Flagtree, bundle: Path, arguments: tuple[str, ...]) -> None:
    source = bundle / "kernels" / DIGEST[:16] / "kernel.py"
    source.chmod(0o644)
    source.write_bytes(b"# edited!!\n")
    ended = flagtree(*arguments, str(bundle))
    assert ended.code == 2
    assert "damaged or was edited" in ended.err
    assert "Traceback" not in ended.err
