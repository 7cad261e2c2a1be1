"""A new chip is one file and no change to the core: an entry point brings it, a model is compiled for it, and the bundle gives numbers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SIZES = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48,
         "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 32,
         "tie_word_embeddings": False, "dtype": "float32"}  # fmt: skip
ENTRY_POINT = "[flagtree.targets]\ntoy = tests.targets.toy_target\n"
SCRIPT = """
import json, re, sys
import flagtree, torch
from flagtree.compile import compile_model

def tensor(name, declared, generator):
    sizes = {"batch": 2, "context": 8}
    kind, shape = re.fullmatch(r"(\\w+)\\[(.*)\\]", declared).groups()
    shape = [sizes.get(n) or int(n) for n in shape.split(", ")]
    return torch.randn(shape, generator=generator) if kind == "f32" else torch.randint(0, 5, shape, generator=generator)

report = compile_model(sys.argv[1], ["plaything", "cpu"], parts=["decode"], jobs=1)
outputs = []
for made in report.bundles:
    bundle = flagtree.load(made.path)
    part, generator = bundle.parts["decode"], torch.Generator().manual_seed(0)
    declared = {**part.weights, **part.states, **part.inputs}
    (logits,) = part({name: tensor(name, declared[name], generator) for name in sorted(declared)}).values()
    outputs.append(logits)
told = {"targets": [made.target for made in report.bundles],
        "finite": bool(outputs[0].isfinite().all()), "equal": torch.allclose(*outputs, rtol=1e-4, atol=1e-5),
        "spread": float(outputs[0].std()),
        "tiers": [dict(made.tiers) for made in report.bundles], "executed": [dict(made.executed) for made in report.bundles]}
print(json.dumps(told))
"""


def test_a_model_is_compiled_for_a_chip_that_one_file_outside_the_tree_describes(tmp_path: Path, repository: Path) -> None:
    installed = tmp_path / "toy_chip-1.dist-info"  # what `pip install` of a package with that entry point leaves
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-chip\nVersion: 1\n")
    (installed / "entry_points.txt").write_text(ENTRY_POINT)
    (tmp_path / "config.json").write_text(json.dumps(SIZES))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(repository), str(tmp_path)))}
    listing = [sys.executable, "-m", "flagtree", "targets", "--json"]
    listed = subprocess.run(listing, env=environment, capture_output=True, text=True, timeout=60)
    (toy,) = [row for row in json.loads(listed.stdout) if row["name"] == "toy:one"]
    assert (toy["reach"], toy["missing"], toy["how"]) == ("binary", "the toy's own assembler", "nobody sells it")
    run = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path / "config.json")], env=environment, capture_output=True, text=True,
                         timeout=300)  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    told = json.loads(run.stdout.splitlines()[-1])
    assert told["targets"] == ["toy:one", "cpu"] and told["tiers"][0].keys() == {"binary"}
    assert told["executed"][0].keys() == {"native x86-64-v2"}
    # the cpu's bundle has products of its own where the toy's leaves them to the library: the numbers agree, not the bits
    assert told["finite"] and told["equal"] and told["spread"] > 0
