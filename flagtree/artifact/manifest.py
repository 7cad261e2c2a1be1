"""The manifest of a bundle as a typed, validated record; its file is hostile until it has passed here.

Strict types, no unknown field, every name and size bounded.  `bundle.py` writes and reads it.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from flagtree.artifact.files import MAX_FILE, check_relative, parse_json
from flagtree.errors import BundleError

FORMAT = 1
_MAX_FILES = 100_000

Digest = Annotated[str, Field(pattern=r"\A[0-9a-f]{64}\z")]
Name = Annotated[str, Field(pattern=r"\A[A-Za-z0-9_][A-Za-z0-9_.:+-]*\z", max_length=200)]
Text = Annotated[str, Field(max_length=100_000)]


class _Record(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class ListedFile(_Record):
    """A file of the bundle: its hash and size in bytes."""

    sha256: Digest
    size: Annotated[int, Field(ge=0, le=MAX_FILE)]


class ListedKernel(_Record):
    """A kernel: the tier reached, what is missing for the next, what a launch needs, what the toolchain told."""

    tier: Annotated[str, Field(pattern=r"\A(source|ttir|llir|binary)\z")]
    missing: Text
    launch: dict[str, object]
    facts: dict[str, object]
    files: list[str]


class Manifest(_Record):
    """`manifest.json`.  `coverage`: what the bundle promises (symbols, shapes, dtypes); `versions`: what built it.  `ranks`: for a
    model divided over ranks their `count`, the `group` of its collectives and the parts of the `weights` that each rank loads."""

    format: int
    name: Annotated[str, Field(min_length=1, max_length=200)]
    target: Name
    versions: dict[Name, Text]
    parts: list[Name]
    libraries: list[Name]
    kernels: dict[Digest, ListedKernel]
    coverage: dict[str, object]
    ranks: dict[str, object] = {}
    files: Annotated[dict[str, ListedFile], Field(max_length=_MAX_FILES)]

    @model_validator(mode="after")
    def _names_agree(self) -> Manifest:
        for name in self.files:
            check_relative(name)
        needed = [f"launch/{p}.json" for p in self.parts] + [f"lib/{x}.so" for x in self.libraries]
        needed += [f"kernels/{d[:16]}/{f}" for d, k in self.kernels.items() for f in k.files]
        absent = next((n for n in needed if n not in self.files), None)
        if absent is not None:
            raise ValueError(f"it names {absent} but does not list it")
        for name in self.files.keys() & {"manifest.json", "certificate.json"}:
            raise ValueError(f"it lists {name}")
        return self


def read_manifest(data: bytes, where: str = "") -> Manifest:
    """The validated manifest.  BundleError: unreadable, another format, a field wrong."""
    record = parse_json(data, "manifest.json", where)
    found = record.get("format") if isinstance(record, dict) else None
    if isinstance(found, int) and found != FORMAT:
        newer = found > FORMAT
        raise BundleError(
            f"the bundle was made by {'a newer' if newer else 'an older'} flagtree",
            where=where,
            why=f"format {found}, this flagtree reads format {FORMAT}",
            hint="update flagtree here" if newer else "build the bundle again",
        )
    try:
        return Manifest.model_validate(record)
    except ValidationError as e:
        first = e.errors(include_url=False, include_input=False)[0]
        field = f"{where} {'.'.join(str(x) for x in first['loc'])}".strip()
        hint = "build it again, or copy it again"
        raise BundleError("the manifest of the bundle is not valid", where=field, why=first["msg"], hint=hint) from None
