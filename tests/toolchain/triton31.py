"""Generated sources through stock Triton 3.1 for cuda:80, in the Python that the environment names (tests/toolchain/triton31_gate.py)."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

from flagtree.codegen.triton import TritonSource
from flagtree.settings import settings


def compiled_by_31(sources: Mapping[str, TritonSource], folder: Path) -> dict[str, str]:
    """By name, why a source does not compile; empty when all do."""
    requests = []
    for number, (name, source) in enumerate(sources.items()):
        path = folder / f"source_{number}.py"
        path.write_text(source.text)
        requests.append({"name": name, "path": str(path), "function": source.function, "signature": source.signature,
                         "aligned": source.aligned, "warps": source.warps})  # fmt: skip
    done = subprocess.run([str(settings.triton31_python), str(Path(__file__).with_name("triton31_gate.py"))], input=json.dumps(requests),
                          capture_output=True, text=True, env={**os.environ, "TRITON_CACHE_DIR": str(folder / "cache")})  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return {name: why for name, why in json.loads(done.stdout.splitlines()[-1]).items() if why}
