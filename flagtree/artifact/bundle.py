"""Bundles on disk: what `flagtree compile` hands over, as a folder or as one `.ftb` file.

`manifest.json` holds the hash of every other file but the certificate, and its own hash is the bundle's digest; opening
checks every name and size and runs nothing.  The compiler writes, `runtime/load.py` and `inspect` read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from flagtree.artifact import certificate as certificates
from flagtree.artifact.container import Container, open_container, publish
from flagtree.artifact.files import MAX_JSON, canonical_json, check_relative, parse_json, sha256
from flagtree.artifact.manifest import FORMAT, Manifest, read_manifest
from flagtree.errors import BundleError, StoreError

if TYPE_CHECKING:
    import torch

_UNHASHED = ("manifest.json", "certificate.json")


class KernelFiles(Protocol):
    """What the writer needs of a `toolchain.base.BuiltKernel`; this package does not import the toolchain."""

    @property
    def digest(self) -> str: ...
    @property
    def tier(self) -> str: ...
    @property
    def missing(self) -> str: ...
    @property
    def files(self) -> Mapping[str, bytes]: ...
    @property
    def launch(self) -> Mapping[str, object]: ...
    @property
    def facts(self) -> Mapping[str, object]: ...


def program_file(part: str) -> str:
    """Where a bundle holds the program of a part, after all passes and at full depth, as text."""
    return f"launch/{part}.ir"


# -- writing ---------------------------------------------------------------------------------------------------------
def write_bundle(
    path: Path,
    *,
    name: str,
    target: str,
    parts: Mapping[str, Mapping[str, object]],
    kernels: Sequence[KernelFiles],
    libraries: Mapping[str, bytes] | None = None,
    constants: Mapping[str, torch.Tensor] | None = None,
    coverage: Mapping[str, object] | None = None,
    versions: Mapping[str, str] | None = None,
    certificate: Mapping[str, object] | None = None,
    graphs: Mapping[str, str] | None = None,
    programs: Mapping[str, str] | None = None,
    ranks: Mapping[str, object] | None = None,
) -> str:
    """Write a bundle and return its digest.

    `path` ending in `.ftb` gives one file, else a folder.  `parts`: part name to launch list; `libraries`: CPU level to
    shared object; `graphs`: part name to the canonical text of the graph that it is; `programs`: to the text of the program whose
    launch list it is; `ranks`: what each rank loads of a divided model; `certificate`: the evidence, which does not enter the digest.
    Equal arguments give equal bytes.  A bundle that stands at `path` is replaced in one step once the new one is complete; BundleError
    when something else stands there, StoreError when the folder cannot be written.
    """
    content = _content(parts, kernels, libraries or {}, constants or {})
    content.update({f"graphs/{part}.txt": text.encode() for part, text in (graphs or {}).items()})
    content.update({program_file(part): text.encode() for part, text in (programs or {}).items()})
    manifest: dict[str, object] = {
        "format": FORMAT,
        "name": name,
        "target": target,
        "versions": dict(versions or {}),
        "parts": sorted(parts),
        "libraries": sorted(libraries or {}),
        "kernels": {k.digest: _listed(k) for k in kernels},
        "coverage": dict(coverage or {}),
        **({"ranks": dict(ranks)} if ranks else {}),
    }
    return _publish(path, manifest, content, certificate)


def write_again(
    bundle: Bundle,
    path: Path,
    kernels: Sequence[KernelFiles],
    *,
    coverage: Mapping[str, object],
    versions: Mapping[str, str],
    certificate: Mapping[str, object] | None,
) -> str:
    """Write `bundle` at `path` with some of its kernels replaced, whole; returns the new digest.  All else keeps its bytes.

    Errors as `write_bundle`.  `path` may be the bundle's own: it is read before it is replaced.
    """
    folders = tuple(f"kernels/{kernel.digest[:16]}/" for kernel in kernels)
    content = {name: bundle.read(name) for name in bundle.manifest.files if not name.startswith(folders)}
    content |= _content({}, kernels, {}, {})
    manifest = bundle.manifest.model_dump(mode="json", exclude={"files"}, exclude_defaults=True)
    manifest["kernels"] |= {kernel.digest: _listed(kernel) for kernel in kernels}
    return _publish(path, {**manifest, "coverage": dict(coverage), "versions": dict(versions)}, content, certificate)


def _publish(path: Path, manifest: Mapping[str, object], content: dict[str, bytes], certificate: Mapping[str, object] | None) -> str:
    listed = {check_relative(n): {"sha256": sha256(d), "size": len(d)} for n, d in content.items()}
    content["manifest.json"] = canonical_json({**manifest, "files": listed})
    digest = sha256(content["manifest.json"])
    read_manifest(content["manifest.json"])  # never publish what `open_bundle` would refuse
    if certificate is not None:
        content["certificate.json"] = certificates.Certificate(digest, certificate).encode()
    elif _stands_at(path, digest):
        return digest  # the same bundle, perhaps with a certificate that is worth keeping
    publish(path, content)
    return digest


def copy_bundle(source: Path, target: Path) -> str:
    """The whole bundle at `source`, certificate included, at `target` too; returns its digest.  Errors as `write_bundle`."""
    bundle = open_bundle(source)
    bundle.verify()
    if not _stands_at(target, bundle.digest):
        publish(target, {name: bundle.container.read(name, size) for name, size in bundle.container.sizes.items()})
    return bundle.digest


def _stands_at(path: Path, digest: str) -> bool:
    try:
        bundle = open_bundle(path)
        if bundle.digest == digest:
            bundle.verify()
        return bundle.digest == digest
    except (BundleError, StoreError):
        return False


def _listed(kernel: KernelFiles) -> dict[str, object]:
    return {
        "tier": kernel.tier,
        "missing": kernel.missing,
        "launch": dict(kernel.launch),
        "facts": dict(kernel.facts),
        "files": sorted(kernel.files),
    }


def _content(
    parts: Mapping[str, Mapping[str, object]],
    kernels: Sequence[KernelFiles],
    libraries: Mapping[str, bytes],
    constants: Mapping[str, torch.Tensor],
) -> dict[str, bytes]:
    content: dict[str, bytes] = {}
    for kernel in kernels:
        for file, data in kernel.files.items():
            content[f"kernels/{kernel.digest[:16]}/{file}"] = data
    content.update({f"lib/{level}.so": data for level, data in libraries.items()})
    content.update({f"launch/{part}.json": canonical_json(launch) for part, launch in parts.items()})
    if constants:
        import safetensors.torch

        content["constants.safetensors"] = safetensors.torch.save({n: constants[n].contiguous() for n in sorted(constants)})
    return content


def write_certificate(path: Path, evidence: Mapping[str, object]) -> None:
    """Give the bundle at `path` another certificate; its digest stays.  BundleError when it is no whole bundle."""
    bundle = open_bundle(path)
    data = certificates.Certificate(bundle.digest, evidence).encode()
    bundle.container.replace("certificate.json", data)


# -- reading ---------------------------------------------------------------------------------------------------------
class Bundle:
    """An opened bundle.  Files are read when asked for, and every read is verified against the manifest."""

    def __init__(self, container: Container, manifest: Manifest, digest: str) -> None:
        self.container, self.manifest, self.digest = container, manifest, digest
        self.path = container.path

    def read(self, name: str) -> bytes:
        """A file's bytes.  BundleError when the manifest does not list it or the content is not what it says."""
        listed = self.manifest.files.get(name)
        if listed is None:
            raise BundleError("the bundle has no such file", where=f"{self.path}/{name}")
        data = self.container.read(name, listed.size)
        if len(data) != listed.size or sha256(data) != listed.sha256:
            raise _edited(f"{self.path}/{name}", "the file does not have the hash in the manifest")
        return data

    def part(self, name: str) -> dict:
        """The launch list of a part."""
        if name not in self.manifest.parts:
            raise BundleError(f"the bundle has no part '{name}'", where=str(self.path), hint=f"its parts: {', '.join(self.manifest.parts)}")
        launch = parse_json(self.read(f"launch/{name}.json"), f"launch/{name}.json")
        if not isinstance(launch, dict):
            raise BundleError("a launch list is not an object", where=f"{self.path}/launch/{name}.json")
        return launch

    def library(self, level: str) -> bytes:
        """The shared object of a CPU level."""
        return self.read(f"lib/{level}.so")

    def constants(self) -> dict[str, torch.Tensor]:
        """Tables computed when the bundle was built, by name."""
        if "constants.safetensors" not in self.manifest.files:
            return {}
        import safetensors.torch

        try:
            return safetensors.torch.load(self.read("constants.safetensors"))
        except Exception as e:  # safetensors' own error class is not exported where it is raised
            raise BundleError("the constants cannot be read", where=f"{self.path}/constants.safetensors", why=str(e)) from None

    def certificate(self) -> certificates.Certificate | None:
        """The certificate, or None when there is none.  BundleError when it was edited or is another bundle's."""
        if "certificate.json" not in self.container.sizes:
            return None
        return certificates.decode(self.container.read("certificate.json", MAX_JSON), self.digest)

    def verify(self) -> None:
        """Read and check every file, the certificate included; BundleError for the first that is wrong."""
        for name in sorted(self.manifest.files):
            self.read(name)
        for part in self.manifest.parts:
            self.part(part)
        self.certificate()


def open_bundle(path: Path | str) -> Bundle:
    """Open a bundle, folder or `.ftb`, and check its manifest, every name and every size; no code of it runs.

    BundleError, with what to try: no bundle, damaged, edited, of an older or newer format, a name that leaves the
    bundle, a link, files too many or too few.
    """
    path = Path(path)
    container = open_container(path)
    if "manifest.json" not in container.sizes:
        hint = "flagtree compile MODEL --out DIR writes one"
        raise BundleError("not a bundle", where=str(path), why="it has no manifest.json", hint=hint)
    raw = container.read("manifest.json", MAX_JSON)
    manifest = read_manifest(raw, where=str(path))
    present = {n: s for n, s in container.sizes.items() if n not in _UNHASHED}
    listed = manifest.files
    problems = [f"{n} is missing" for n in listed if n not in present]
    problems += [f"{n} is not in the manifest" for n in present if n not in listed]
    problems += [f"{n} has {s} bytes instead of {listed[n].size}" for n, s in present.items() if n in listed and s != listed[n].size]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise _edited(str(path), "; ".join(problems[:3]) + more)
    return Bundle(container, manifest, sha256(raw))


def _edited(where: str, why: str) -> BundleError:
    return BundleError("the bundle is damaged or was edited", where=where, why=why, hint="copy it again, or build it again")


def inspect(bundle: Bundle) -> dict:
    """Everything that `flagtree inspect` shows, as JSON: no code of the bundle runs.  Files are verified."""
    bundle.verify()
    manifest = bundle.manifest
    evidence = bundle.certificate()
    tiers: dict[str, int] = {}
    for kernel in manifest.kernels.values():
        tiers[kernel.tier] = tiers.get(kernel.tier, 0) + 1
    return {
        "path": str(bundle.path),
        "digest": bundle.digest,
        "name": manifest.name,
        "target": manifest.target,
        "versions": manifest.versions,
        "bytes": sum(bundle.container.sizes.values()),
        "files": {n: f.size for n, f in sorted(manifest.files.items())},
        "tiers": tiers,
        "kernels": {d: k.model_dump(mode="json") for d, k in sorted(manifest.kernels.items())},
        "libraries": list(manifest.libraries),
        "parts": {name: _summary(bundle, name) for name in manifest.parts},
        "coverage": manifest.coverage,
        "ranks": manifest.ranks.get("count", 1),
        "certificate": None if evidence is None else dict(evidence.evidence),
    }


def _summary(bundle: Bundle, part: str) -> dict:
    try:
        return summarise(bundle.part(part))
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as e:
        why = f"{type(e).__name__}: {e}"
        raise BundleError("a launch list is not valid", where=f"{bundle.path}/launch/{part}.json", why=why, hint="build it again") from None


def summarise(launch: Mapping) -> dict:
    """Counts of a launch list: launches, externs with reason, weights, symbols; repeats counted as often as they run."""
    launches = 0
    externs: dict[tuple[str, str], int] = {}
    work = [(step, 1) for step in launch.get("steps", ())]
    while work:
        step, times = work.pop(0)
        if "repeat" in step:
            work[:0] = [(inner, times * step["repeat"]) for inner in step["steps"]]
        elif "kernel" in step:
            launches += times
            if "above" in step:
                work.insert(0, (step["above"]["extern"], times))
        else:
            call = (step["extern"], step.get("reason", ""))
            externs[call] = externs.get(call, 0) + times
    roles: dict[str, list[str]] = {}
    for buffer in launch.get("buffers", ()):
        roles.setdefault(buffer["role"], []).append(buffer["name"])
    return {
        "launches": launches,
        "externs": [{"callee": c, "reason": r, "count": n} for (c, r), n in sorted(externs.items())],
        "symbols": list(launch.get("symbols", ())),
        "inputs": roles.get("input", []) + roles.get("scalar", []),
        "states": roles.get("state", []),
        "weights": len(roles.get("weight", [])),
        "outputs": [o for o in launch.get("outputs", ()) if isinstance(o, str)],
    }
