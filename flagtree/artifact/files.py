"""Files as evidence: canonical JSON, hashes, atomic writes, and reads that trust neither a path nor a size.

Every byte that the store or a bundle reads or writes passes through here; nothing is followed out of its folder and
nothing is read before its size is known to be within bounds.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from flagtree.errors import BundleError, StoreError

MAX_JSON = 64 << 20  # bytes; a launch list of 144 layers is below 4 MiB
MAX_FILE = 4 << 30  # bytes; one file of a bundle or of the store
MAX_DEPTH = 64  # nested lists and objects
MAX_NAME = 240  # bytes of one part of a path, below every file system's 255

_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*\Z")


def canonical_json(value: object) -> bytes:
    """Sorted keys, no spaces, UTF-8, final newline: equal values are equal bytes.  ValueError for NaN and infinities."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8") + b"\n"


def sha256(data: bytes) -> str:
    """The hash as 64 hex digits."""
    return hashlib.sha256(data).hexdigest()


def parse_json(data: bytes, what: str, where: str = "") -> object:
    """JSON from a hostile file below `where`.  BundleError when it is too large, too deep, not UTF-8, repeats a key or holds NaN."""
    if len(data) > MAX_JSON:
        raise BundleError(f"{what} is too large", where=where, why=f"{len(data)} bytes, the limit is {MAX_JSON}")

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        out = dict(pairs)
        if len(out) != len(pairs):
            raise ValueError("a key stands twice in one object")
        return out

    def refuse(name: str) -> object:
        raise ValueError(f"{name} is not JSON")

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
        _check_depth(value)
    except (ValueError, RecursionError) as e:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        why = f"not the JSON that flagtree writes: {e or 'too deep'}"
        raise BundleError(f"{what} cannot be read", where=where, why=why, hint="build it again, or copy it again") from None
    return value


def _check_depth(value: object) -> None:
    level, depth = [value] if isinstance(value, (dict, list)) else [], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError("too deep")
        inner = (x for v in level for x in (v.values() if isinstance(v, dict) else v))
        level = [x for x in inner if isinstance(x, (dict, list))]


# -- names -----------------------------------------------------------------------------------------------------------
def check_relative(name: str) -> str:
    """`name` itself when it is a plain relative path of ASCII parts joined by `/`; BundleError otherwise."""
    parts = name.split("/")
    if len(parts) > 8 or not all(_PART.match(p) and len(p) <= MAX_NAME for p in parts):
        why = "names are relative, without '..', blanks or odd characters"
        raise BundleError("a file name is not allowed", where=repr(name[:200]), why=why)
    return name


# -- reading ---------------------------------------------------------------------------------------------------------
def read_inside(root: Path, name: str, limit: int = MAX_FILE) -> bytes:
    """The bytes of the regular file `root/name`.  No link is followed below `root`; BundleError when the name is not
    allowed, the file is missing, no regular file or larger than `limit` bytes; StoreError when the system refuses."""
    parts = check_relative(name).split("/")
    with contextlib.ExitStack() as stack:
        try:
            folder = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            stack.callback(os.close, folder)
            for part in parts[:-1]:
                folder = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
                stack.callback(os.close, folder)
            # O_NONBLOCK: opening a named pipe must not wait for a writer
            file = os.open(parts[-1], os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
            stack.callback(os.close, file)
            return _read_all(file, f"{root}/{name}", limit)
        except OSError as e:
            raise reading_failed(e, f"{root}/{name}") from None


def read_file(path: Path, limit: int = MAX_FILE) -> bytes:
    """The bytes of a regular file that the user named (its links are followed); errors as `read_inside`."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as e:
        raise reading_failed(e, str(path)) from None
    try:
        return _read_all(file, str(path), limit)
    except OSError as e:
        raise reading_failed(e, str(path)) from None
    finally:
        os.close(file)


def _read_all(file: int, where: str, limit: int) -> bytes:
    info = os.fstat(file)
    if not stat.S_ISREG(info.st_mode):
        raise BundleError("not a regular file", where=where)
    if info.st_size > limit:
        raise BundleError("a file is larger than allowed", where=where, why=f"{info.st_size} bytes, the limit is {limit}")
    chunks, left = [], info.st_size
    while left and (chunk := os.read(file, min(left, 1 << 24))):
        chunks.append(chunk)
        left -= len(chunk)
    return b"".join(chunks)


def reading_failed(error: OSError, where: str) -> BundleError | StoreError:
    """Our error for a failed read: a link, a missing file or a wrong kind is the artefact's fault, the rest the system's."""
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return BundleError("a file is missing", where=where, hint="copy or build it again")
    if error.errno in (errno.ELOOP, errno.EMLINK):
        return BundleError("a link stands where a file should", where=where, why="links inside an artefact are not followed")
    return StoreError("cannot read a file", where=where, why=error.strerror or str(error), hint="check who may read it")


# -- writing ---------------------------------------------------------------------------------------------------------
_TRY = {
    errno.ENOSPC: "free some space, or name another folder",
    errno.EDQUOT: "your quota is used up: free some space, or name another folder",
    errno.EROFS: "the file system is read-only: name another folder",
    errno.EACCES: "give yourself write permission, or name another folder",
    errno.EPERM: "give yourself write permission, or name another folder",
    errno.ENOTDIR: "a file stands where a folder should: move it away, or name another folder",
    errno.EEXIST: "a file stands where a folder should: move it away, or name another folder",
    errno.ENAMETOOLONG: "name a shorter path",
    errno.ENOSYS: "this system cannot swap two folders in one step: move the old one away, or name another folder",
    errno.EINVAL: "this file system cannot swap two folders in one step: move the old one away, or name another folder",
}


@contextlib.contextmanager
def writing(where: Path | str, how: str = "") -> Iterator[None]:
    """Turn an OSError of the block into a StoreError that says what to try; `how` names the option that moves the folder."""
    try:
        yield
    except OSError as e:
        hint = _TRY.get(e.errno or 0, "name another folder")
        hint = f"{hint} ({how})" if how else hint
        raise StoreError("cannot write", where=str(e.filename or where), why=e.strerror or str(e), hint=hint) from None


def write_new(path: Path, data: bytes, *, durable: bool) -> None:
    """Write a file that does not exist yet.  `durable`: on the disk when this returns (fsync)."""
    with open(path, "xb") as file:
        file.write(data)
        if durable:
            file.flush()
            os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable, where the system can."""
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    except OSError as e:
        if e.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems cannot sync a folder
            raise
    finally:
        os.close(folder)


def atomic_write(path: Path, data: bytes) -> None:
    """Replace `path` by `data`: at any moment, also after a kill, it holds the old bytes or the new.  StoreError when
    the folder cannot be written."""
    with writing(path):
        handle, name = tempfile.mkstemp(prefix=f".{path.name[:80]}.", suffix=".tmp", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fchmod(file.fileno(), 0o644)
                os.fsync(file.fileno())
            os.replace(name, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise
        sync_folder(path.parent)
