"""A chip in an hour: one file of facts, and a model is compiled for it, checked in the emulator, and bundled.

1. Facts, each with its source (`TARGETS` below).  What passes and code generation read is in `flagtree/targets/base.py`.
2. How far source gets without the vendor's software: `probe`.  `toolchain="triton_ir"` gives every chip with a fork of Triton the
   tier `ttir`; with a compiler of its own, name a module with `build` and `versions` (flagtree/toolchain/base.py), this file even.
3. An entry point, so that an installed package brings the chip in:

       [project.entry-points."flagtree.targets"]
       abacus = "a_chip_in_an_hour"

`main` installs that entry point in a temporary folder, then types what a user would type.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from flagtree.targets import stock_triton
from flagtree.targets.base import Reach, Target

MISSING = "binary needs the abacus assembler, which nobody sells"


def probe() -> Reach:
    """How far source gets on this machine.  A real probe also looks for the vendor's tools."""
    why = stock_triton.problem()
    return Reach("source", missing=why, how=stock_triton.INSTALL) if why else Reach("ttir", missing=MISSING, how="ask the vendor for it")


TARGETS = (
    Target(
        name="abacus:v1",
        family="abacus",
        description="a chip of this example",
        language="triton",
        toolchain="triton_ir",
        tiers=("source", "ttir", "binary"),
        aliases=("abacus",),
        triton=("ttir", "abacus:v1", 32),
        warp=32,
        max_threads=256,
        row_limit=2048,
        dtypes=frozenset({"b1", "i32", "i64", "f16", "bf16", "f32"}),
        options={"missing": MISSING},
        facts_from={"warp": "the vendor's manual, page and version", "max_threads": "the same", "row_limit": "ours: 8 elements a thread"},
        probe=probe,
    ),
)
CONFIG = {
    "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "vocab_size": 97, "hidden_size": 64, "intermediate_size": 160,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64,
    "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip


def flagtree(folder: Path, *words: str) -> str:
    """What the command prints, with this file and its entry point where Python looks for packages."""
    path = os.pathsep.join(filter(None, (str(folder), str(Path(__file__).parent), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "flagtree", *words]
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, text=True, check=True).stdout


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        installed = folder / "abacus-1.dist-info"  # what `pip install` leaves
        installed.mkdir()
        (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: abacus\nVersion: 1\n")
        (installed / "entry_points.txt").write_text("[flagtree.targets]\nabacus = a_chip_in_an_hour\n")
        (folder / "config.json").write_text(json.dumps(CONFIG))
        reach = next(row for row in json.loads(flagtree(folder, "targets", "--json")) if row["name"] == "abacus:v1")
        print(f"abacus:v1 reaches {reach['reach']}; missing: {reach['missing']}")
        if reach["reach"] == "source":
            return
        out = folder / "bundles"
        print(flagtree(folder, "compile", str(folder / "config.json"), "--target", "abacus", "--part", "decode", "--out", str(out)))


if __name__ == "__main__":
    main()
