"""The store: results of the compiler on this machine's disk, by kind and key, verified at every read.

An entry is a folder with `entry.json` (the hash of every file) that appears by one rename, whole or not at all; trouble
with an entry is a miss with a reason, never an error.  The compiler puts, the runtime gets; read-only layers lie below.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import filelock

from flagtree.artifact import files
from flagtree.errors import BundleError, StoreError
from flagtree.settings import settings

FORMAT = 1
KEEP = frozenset({"built"})  # kinds that `prune` spares: tiny, and losing them loses the user's trust in a bundle
LOCK_SECONDS = 120.0
_HOW = "FLAGTREE_CACHE_DIR moves the store"
_KIND = re.compile(r"[a-z][a-z0-9_-]{0,31}\Z")
_KEY = re.compile(r"[0-9a-f]{64}\Z")


@dataclass(frozen=True, slots=True)
class Entry:
    """A stored result, read and verified: `files` name to bytes, `meta` the JSON object given to `put`."""

    kind: str
    key: str
    meta: Mapping[str, object]
    files: Mapping[str, bytes]
    path: Path


@dataclass(frozen=True, slots=True)
class Miss:
    """Nothing usable, and why.  False in a condition, so that `if entry := store.get(...)` reads well."""

    reason: str

    def __bool__(self) -> Literal[False]:
        return False


@dataclass(frozen=True, slots=True)
class Usage:
    """What a kind takes: number of entries and their bytes."""

    entries: int
    bytes: int


class Store:
    """`root` is the writable folder, `layers` read-only ones of the same shape.  Safe for any number of processes."""

    def __init__(self, root: Path | None = None, layers: tuple[Path, ...] | None = None) -> None:
        self.root = (settings.cache_dir if root is None else root) / f"v{FORMAT}"
        self.layers = tuple(p / f"v{FORMAT}" for p in (settings.cache_layers if layers is None else layers))

    # -- reading -----------------------------------------------------------------------------------------------------
    def get(self, kind: str, key: str) -> Entry | Miss:
        """The entry, from the writable folder or the first layer that has a whole one, else the reason."""
        reasons = []
        for root in (self.root, *self.layers):
            path = _place(root, kind, key)
            try:
                entry = _read(path, kind, key)
            except FileNotFoundError:
                continue
            except (BundleError, StoreError, OSError, ValueError) as e:
                reasons.append(f"damaged entry in {path}: {_reason(e)}")
                continue
            if root is self.root:
                with contextlib.suppress(OSError):  # for `prune`; a read-only store is no trouble
                    os.utime(path)
            return entry
        return Miss("; ".join(reasons) or "not stored")

    def stored(self, kind: str) -> Iterator[Mapping[str, object]]:
        """The `meta` of each whole entry of a kind, newest first, for explanations; damaged ones are left out."""
        for root in (self.root, *self.layers):
            paths = sorted(_entries(root, kind), key=lambda p: (-_modified(p), p.name))
            for path in paths:
                with contextlib.suppress(BundleError, StoreError, OSError, ValueError):
                    yield _read_meta(path, kind, path.name)[0]

    # -- writing -----------------------------------------------------------------------------------------------------
    def put(self, kind: str, key: str, content: Mapping[str, bytes], meta: Mapping[str, object] | None = None) -> Entry:
        """Store `content` under (kind, key) and return the entry.  A whole entry that is already there stays, a damaged one
        is replaced.  StoreError when the folder cannot be written; nothing that was there is lost."""
        target = _place(self.root, kind, key)
        record = {
            "format": FORMAT, "kind": kind, "key": key, "meta": dict(meta or {}),
            "files": {files.check_relative(n): {"sha256": files.sha256(d), "size": len(d)} for n, d in content.items()},
        }  # fmt: skip
        manifest = files.canonical_json(record)
        with self._locked():
            with contextlib.suppress(BundleError, StoreError, OSError, ValueError):
                return _read(target, kind, key)  # another process was faster
            with files.writing(self.root, _HOW):
                temporary = self.root / "tmp" / secrets.token_hex(8)
                try:
                    _write(temporary, {**content, "entry.json": manifest})
                    target.parent.mkdir(parents=True, exist_ok=True)
                    if os.path.lexists(target):  # damaged: out of the way first, then the whole one in
                        os.rename(target, self.root / "tmp" / secrets.token_hex(8))
                    os.rename(temporary, target)
                finally:
                    _sweep(self.root / "tmp")
        return Entry(kind, key, record["meta"], dict(content), target)  # type: ignore[arg-type]

    def writable(self) -> bool:
        """Can `put` work now?  Looks, by taking the lock and making a folder."""
        try:
            with self._locked(), files.writing(self.root, _HOW):
                probe = self.root / "tmp" / secrets.token_hex(8)
                _write(probe, {"entry.json": b"{}\n"})
                _sweep(self.root / "tmp")
        except StoreError:
            return False
        return True

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        # one writer at a time: then every folder under tmp/ that a writer finds was left by a killed one
        with files.writing(self.root, _HOW):
            self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
            lock = filelock.FileLock(str(self.root / "lock"))
            try:
                lock.acquire(timeout=LOCK_SECONDS)
            except filelock.Timeout:
                why = f"waited {LOCK_SECONDS:.0f} s for its lock"
                raise StoreError("another process holds the store", where=str(self.root), why=why, hint="end it, or wait") from None
        try:
            yield
        finally:
            lock.release()

    # -- housekeeping ------------------------------------------------------------------------------------------------
    def usage(self) -> dict[str, Usage]:
        """Entries and bytes per kind of the writable folder, damaged ones included."""
        out = {}
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            for kind in sorted(p.name for p in self.root.iterdir() if _KIND.match(p.name) and p.name not in ("tmp", "lock")):
                paths = list(_entries(self.root, kind))
                out[kind] = Usage(len(paths), sum(map(_size, paths)))
        return out

    def prune(self, max_bytes: int) -> Usage:
        """Delete the entries used longest ago until at most `max_bytes` are left; returns what was deleted."""
        deleted = freed = 0
        with self._locked(), files.writing(self.root, _HOW):
            found = [p for kind in self.usage() if kind not in KEEP for p in _entries(self.root, kind)]
            sizes = {p: _size(p) for p in sorted(found, key=lambda p: (_modified(p), p.name))}
            total = sum(sizes.values())
            (self.root / "tmp").mkdir(exist_ok=True)
            for path, size in sizes.items():
                if total - freed <= max_bytes:
                    break
                os.rename(path, self.root / "tmp" / secrets.token_hex(8))  # gone for readers at once, never half
                deleted, freed = deleted + 1, freed + size
            _sweep(self.root / "tmp")
        return Usage(deleted, freed)


# -- one entry -------------------------------------------------------------------------------------------------------
def _place(root: Path, kind: str, key: str) -> Path:
    if not _KIND.match(kind) or not _KEY.match(key) or kind in ("tmp", "lock"):
        raise StoreError("not a kind and key of the store", where=f"{kind}/{key}")
    return root / kind / key[:2] / key


def _entries(root: Path, kind: str) -> Iterator[Path]:
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for shelf in sorted((root / kind).iterdir()):
            yield from (p for p in sorted(shelf.iterdir()) if _KEY.match(p.name))


def _read_meta(path: Path, kind: str, key: str) -> tuple[dict[str, object], dict[str, dict]]:
    """`meta` and the file table of an entry; FileNotFoundError when there is none at all."""
    if not os.path.lexists(path):
        raise FileNotFoundError(path)
    record = files.parse_json(files.read_inside(path, "entry.json", files.MAX_JSON), "entry.json")
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ValueError("entry.json has another format")
    if (record.get("kind"), record.get("key")) != (kind, key):
        raise ValueError("entry.json names another entry")
    meta, table = record.get("meta"), record.get("files")
    if not isinstance(meta, dict) or not isinstance(table, dict):
        raise ValueError("entry.json lacks its table")
    return meta, table


def _read(path: Path, kind: str, key: str) -> Entry:
    meta, table = _read_meta(path, kind, key)
    content = {}
    for name, facts in table.items():
        if not isinstance(facts, dict) or not isinstance(facts.get("size"), int):
            raise ValueError(f"entry.json says nothing of {name}")
        data = files.read_inside(path, name, min(facts["size"], files.MAX_FILE))
        if len(data) != facts["size"] or files.sha256(data) != facts.get("sha256"):
            raise ValueError(f"{name} is not what was stored")
        content[name] = data
    return Entry(kind, key, cast("Mapping[str, object]", meta), content, path)


def _write(folder: Path, content: Mapping[str, bytes]) -> None:
    # no fsync: a file that a power cut emptied fails its hash, which is a miss
    folder.mkdir(parents=True)
    for name, data in content.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_new(path, data, durable=False)


def _sweep(folder: Path) -> None:
    """Empty tmp/; only called under the lock."""
    for leftover in folder.iterdir() if folder.is_dir() else ():
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def _reason(error: Exception) -> str:
    what, why = getattr(error, "what", str(error)), getattr(error, "why", "")
    return f"{what} ({why})" if why else what


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _size(path: Path) -> int:
    total = 0
    for folder, _, names in os.walk(path):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(folder, name)).st_size
    return total
