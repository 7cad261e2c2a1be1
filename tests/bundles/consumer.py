"""A program that serves a bundle where nothing could compile: run by the tests in a process of its own.

usage: python consumer.py BUNDLE DIGEST FOLDER; FOLDER has weights.safetensors and requests.safetensors, and gets logits.safetensors
and told.json.  An import of the compiler, of what it needs or of transformers raises; so does starting any process.
"""

import json
import sys
from pathlib import Path

FORBIDDEN = ("transformers", "networkx", "jinja2", "triton", "yaml", *(f"flagtree.{part}" for part in (
    "capture", "ir", "lower", "passes", "codegen", "toolchain", "targets", "compile", "assemble", "check", "cli")))  # fmt: skip
attempts: list[str] = []


class NoCompiler:
    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if any(name == each or name.startswith(f"{each}.") for each in FORBIDDEN):
            attempts.append(name)
            raise ImportError(f"{name} is not for this process")


def no_process(event: str, arguments: tuple[object, ...]) -> None:
    if event in ("subprocess.Popen", "os.fork", "os.exec", "os.posix_spawn", "os.system"):
        attempts.append(f"{event} {arguments[:1]}")
        raise OSError("no process is started here")


sys.meta_path.insert(0, NoCompiler())  # type: ignore[arg-type]
sys.addaudithook(no_process)

import safetensors.torch

import flagtree
from tests.bundles.serving import serve


def main(path: str, digest: str, folder: Path) -> None:
    bundle = flagtree.load(path, trust=digest)
    weights = safetensors.torch.load_file(folder / "weights.safetensors")
    asked = safetensors.torch.load_file(folder / "requests.safetensors")
    names = sorted({name.partition("/")[0] for name in asked})
    logits = {n: serve(bundle, weights, asked[f"{n}/ids"], asked[f"{n}/lengths"], asked[f"{n}/following"]) for n in names}
    safetensors.torch.save_file(logits, folder / "logits.safetensors")
    told = {
        "attempts": attempts,
        "level": bundle.level,
        "weights": {name: sorted(part.weights) for name, part in bundle.parts.items()},
        "externs": {name: [[e.callee, e.count, e.reason] for e in part.externs] for name, part in bundle.parts.items()},
        "modules": sorted(sys.modules),
    }
    (folder / "told.json").write_text(json.dumps(told))


main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
