"""One rank of a divided model, as a process: its part of the checkpoint, its bundle, the process group; the results into a file.

Needs torch and the loader alone.  Started by test_ranks.py with one JSON argument.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import distributed

import flagtree
from flagtree.runtime.shares import Safetensors, rank_weights
from tests.bundles.serving import serve


def main() -> None:
    asked = json.loads(sys.argv[1])
    rank, ranks = asked["rank"], asked["ranks"]
    distributed.init_process_group("gloo", init_method=f"file://{asked['meet']}", rank=rank, world_size=ranks)
    bundle = flagtree.load(asked["bundle"], trust=asked["digest"], threads=1)
    given = load_file(asked["question"])
    part = bundle.parts["prefill" if "ids" in given else "vision"]
    weights = rank_weights(bundle.bundle, part.weights, Safetensors(Path(asked["checkpoint"])), rank)
    if part.name == "vision":
        (found,) = part.bind(weights)(given).values()
    else:
        first = {name: given[name] for name in ("features", "feature_rows") if name in given}
        number = torch.tensor([rank])
        found = serve(bundle, weights, given["ids"], given["lengths"], given["following"],
                      lambda step: {"rank": number, **(first if step == 0 else {})})  # fmt: skip
    save_file({"found": found}, asked["out"])
    distributed.destroy_process_group()
    assert not {"sympy", "networkx", "triton"} & sys.modules.keys()


main()
