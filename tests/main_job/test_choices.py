"""What a user may ask of `flagtree compile` beside the model: depth, parts, element type, an own description.  In one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from flagtree.check.report import BundleReport, PartReport
from flagtree.compile import compile_model, folder_name
from flagtree.errors import BundleError, CaptureError, UnknownName
from tests.main_job.conftest import SMALL, content


def part_of(bundle: BundleReport, name: str) -> PartReport:
    return next(part for part in bundle.parts if part.name == name)


def launches(part: PartReport) -> int:
    return part.launches_total + part.calls_extern


def products(part: PartReport) -> tuple[int, int]:
    """Matrix products, as calls and as launches of our own, and the bytes that they move."""
    calls = [(row.count, row.bytes) for row in part.externs if row.callee == "aten.linear.default"]
    launched = [(row.launches, row.launches * row.bytes_after) for row in part.kernels if row.ops == ("aten.linear.default",)]
    return sum(n for n, _ in calls + launched), sum(size for _, size in calls + launched)


@pytest.mark.parametrize("layers", [1, 2])
def test_a_model_too_shallow_to_repeat_is_written_out(small_config: str, layers: int) -> None:
    (bundle,) = compile_model(small_config, ["cpu"], layers=layers).bundles
    for part in bundle.parts:
        assert part.launches_per_layer is None
        assert part.weights == 11 * layers + 3
        assert products(part)[0] == 7 * layers + 1


def test_each_further_layer_adds_the_same_launches(small_config: str) -> None:
    bundles = [compile_model(small_config, ["cpu"], layers=layers).bundles[0] for layers in (2, 3, 5)]
    for name in ("prefill", "decode"):
        two, three, five = (part_of(bundle, name) for bundle in bundles)
        assert three.launches_per_layer == five.launches_per_layer == launches(three) - launches(two)
        assert launches(five) - launches(three) == 2 * (five.launches_per_layer or 0)
        assert five.weights - three.weights == 22


def test_one_part_alone(small_config: str) -> None:
    (bundle,) = compile_model(small_config, ["cpu"], parts=["decode"]).bundles
    assert [part.name for part in bundle.parts] == ["decode"]
    assert sorted(p.name for p in (Path(bundle.path) / "launch").iterdir()) == ["decode.ir", "decode.json"]


def test_another_element_type_halves_the_bytes(small_config: str) -> None:
    (full,) = compile_model(small_config, ["cpu"], parts=["decode"]).bundles
    (half,) = compile_model(small_config, ["cpu"], parts=["decode"], dtype="bf16").bundles
    linear = {bundle.digest: products(bundle.parts[0])[1] for bundle in (full, half)}
    assert linear[full.digest] == 2 * linear[half.digest]
    assert full.path != half.path


def test_a_small_llama_from_its_own_config(tmp_path: Path) -> None:
    config = {k: v for k, v in SMALL.items() if k != "use_sliding_window"}
    config |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": True, "mlp_bias": False}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (bundle,) = compile_model(str(tmp_path), ["cpu"]).bundles
    for part in bundle.parts:
        assert part.weights == 9 * 4 + 2  # no norms of query and key, and the head is the embedding
        assert 0 < (part.launches_per_layer or 0) <= 16
        assert {row.callee for row in part.externs} <= {
            "aten.linear.default", "flagtree.attend.default", "aten.embedding.default", "aten.index.Tensor"}  # fmt: skip


def own(tmp_path: Path, **fields: object) -> str:
    """A description of ours, as a user writes one; `fields` replace its own."""
    config = {k: v for k, v in SMALL.items() if k not in ("architectures", "dtype")}
    parts = {"prefill": {"batch": [1, 2], "sequence": [1, 32], "context": [1, 48]}, "decode": {"batch": [1, 2], "context": [1, 48]}}
    data = {"name": "mine", "architecture": "Qwen3ForCausalLM", "dtype": "float32", "config": config, "parts": parts} | fields
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    return str(path)


def test_an_own_description_with_its_own_bounds(tmp_path: Path) -> None:
    report = compile_model(own(tmp_path), ["cpu"])
    assert report.model == "mine"
    prefill = part_of(report.bundles[0], "prefill")
    assert dict(prefill.symbols) == {"batch": (1, 2, 1), "sequence": (1, 32, 1), "context": (1, 48, 1)}
    assert prefill.reference == {"batch": 1, "sequence": 32, "context": 48}  # 2048 is beyond what it promises


@pytest.mark.parametrize(("batch", "context"), [([1, 1], [1, 48]), ([2, 2], [48, 48])])
def test_sizes_that_are_fixed_are_no_symbols(tmp_path: Path, batch: list[int], context: list[int]) -> None:
    decode = {"batch": [*batch], "context": [*context]}
    parts = {"prefill": {**{k: [*v] for k, v in decode.items()}, "sequence": [1, 32]}, "decode": decode}
    (bundle,) = compile_model(own(tmp_path, parts=parts), ["cpu"]).bundles
    for part in bundle.parts:
        assert "batch" not in part.symbols
        assert ("context" in part.symbols) == (context == [1, 48])
        assert part.launches_per_layer
        assert 0 < (part.bytes_after_per_layer or 0) < (part.bytes_before_per_layer or 0)


@pytest.mark.parametrize("name", ["../../outside", "größe 8b", ".hidden", "a/b"])
def test_a_name_never_leaves_the_folder(tmp_path: Path, name: str) -> None:
    (bundle,) = compile_model(own(tmp_path, name=name), ["cpu"], parts=["decode"], out=tmp_path / "out").bundles
    assert Path(bundle.path).parent == tmp_path / "out"
    assert not Path(bundle.path).name.startswith(".")
    assert (Path(bundle.path) / "manifest.json").is_file()


@pytest.mark.parametrize(("name", "folder"), [("qwen3-8b-cuda:sm90", "qwen3-8b-cuda-sm90"), ("größe 8b", "größe-8b"), ("..", "model")])
def test_folder_names(name: str, folder: str) -> None:
    assert folder_name(name) == folder


def test_one_file_instead_of_a_folder(small_config: str, tmp_path: Path) -> None:
    (folder,) = compile_model(small_config, ["cpu"], parts=["decode"], out=tmp_path).bundles
    (single,) = compile_model(small_config, ["cpu"], parts=["decode"], out=tmp_path / "mit blank.ftb").bundles
    assert Path(single.path).is_file()
    assert single.digest == folder.digest
    with pytest.raises(BundleError, match="several targets"):
        compile_model(small_config, ["cpu", "cuda:sm90"], out=tmp_path / "two.ftb")


def test_wrong_part_and_wrong_element_type_name_the_known_ones(small_config: str) -> None:
    with pytest.raises(UnknownName, match="decode"):
        compile_model(small_config, ["cpu"], parts=["decodes"])
    with pytest.raises(UnknownName, match="bf16"):
        compile_model(small_config, ["cpu"], dtype="bf61")


def test_a_description_that_is_wrong_names_file_and_field(tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match="mine.yaml"):
        compile_model(own(tmp_path, architectur="Qwen3ForCausalLM"), ["cpu"])


@pytest.mark.parametrize("target", ["metax", "cuda:sm80"])
def test_a_gpu_bundle_holds_no_library_of_this_machine(small_config: str, target: str) -> None:
    (bundle,) = compile_model(small_config, [target], parts=["decode"]).bundles
    assert not [name for name in content(Path(bundle.path)) if name.startswith("lib/")]
