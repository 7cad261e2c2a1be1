"""A bundle's bytes on disk: a folder, or one uncompressed zip with fixed times, behind one reader.

Publishing builds the whole next to its place and moves it in by one rename or exchange, so a kill at any moment leaves
the old bundle or the new one; what a killed writer left is recognised by its free lock and removed by the next.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import io
import os
import secrets
import shutil
import stat
import struct
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from flagtree.artifact import files
from flagtree.errors import BundleError, FlagtreeError

SUFFIX = ".ftb"
_MAX_FILES = 100_000
_HOW = "--out names another place"
# what zipfile raises for bytes that are no archive, found by cutting and flipping them
_BAD_ZIP = (zipfile.BadZipFile, KeyError, NotImplementedError, RuntimeError, EOFError, ValueError, OverflowError, struct.error)


# -- reading ---------------------------------------------------------------------------------------------------------
class Container:
    """Names and sizes of the files in a bundle, and their bytes.  `sizes` are the true ones, from the file system."""

    def __init__(self, path: Path, sizes: Mapping[str, int]) -> None:
        self.path, self.sizes = path, sizes

    def read(self, name: str, limit: int) -> bytes:
        """The bytes of a file that must not be larger than `limit`; BundleError when it is."""
        raise NotImplementedError

    def replace(self, name: str, data: bytes) -> None:
        """Write one file anew, atomically."""
        raise NotImplementedError


class _Folder(Container):
    def read(self, name: str, limit: int) -> bytes:
        return files.read_inside(self.path, name, limit)

    def replace(self, name: str, data: bytes) -> None:
        files.atomic_write(self.path / files.check_relative(name), data)


class _Archive(Container):
    def read(self, name: str, limit: int) -> bytes:
        if self.sizes.get(name, 0) > limit:
            why = f"{self.sizes[name]} bytes, the limit is {limit}"
            raise BundleError("a file is larger than allowed", where=f"{self.path}/{name}", why=why)
        try:
            with zipfile.ZipFile(self.path) as archive:
                return archive.read(name)
        except _BAD_ZIP as e:
            raise _damaged(self.path, str(e)) from None
        except OSError as e:
            raise _archive_failed(e, self.path) from None

    def replace(self, name: str, data: bytes) -> None:
        content = {n: self.read(n, files.MAX_FILE) for n in self.sizes}
        files.atomic_write(self.path, archive_bytes({**content, name: data}))


def open_container(path: Path) -> Container:
    """Open what stands at `path` and list it.  BundleError for anything that is not plain files with plain names."""
    try:
        mode = os.stat(path).st_mode
    except OSError as e:
        if e.errno in (errno.ENOENT, errno.ENOTDIR):
            raise BundleError("there is no bundle", where=str(path), hint="flagtree compile MODEL --out DIR writes one") from None
        raise files.reading_failed(e, str(path)) from None
    if stat.S_ISDIR(mode):
        return _Folder(path, _list_folder(path))
    if stat.S_ISREG(mode):
        return _Archive(path, _list_archive(path))
    why, hint = "neither a folder nor a file", "flagtree compile MODEL --out DIR writes one"
    raise BundleError("not a bundle", where=str(path), why=why, hint=hint)


def _list_folder(root: Path) -> dict[str, int]:
    sizes: dict[str, int] = {}
    folders = [("", root)]
    try:
        while folders:
            prefix, folder = folders.pop()
            with os.scandir(folder) as found:
                for item in found:
                    name = files.check_relative(prefix + item.name)
                    if item.is_symlink():
                        why = "links inside a bundle are not followed"
                        raise BundleError("a link stands in the bundle", where=f"{root}/{name}", why=why)
                    if item.is_dir():
                        folders.append((f"{name}/", Path(item.path)))
                    elif item.is_file():
                        sizes[name] = item.stat(follow_symlinks=False).st_size
                    else:
                        raise BundleError("not a regular file", where=f"{root}/{name}")
                    if len(sizes) + len(folders) > _MAX_FILES:
                        raise BundleError("too many files", where=str(root), why=f"the limit is {_MAX_FILES}")
    except OSError as e:
        raise files.reading_failed(e, str(root)) from None
    return sizes


def _list_archive(path: Path) -> dict[str, int]:
    sizes: dict[str, int] = {}
    try:
        total = os.path.getsize(path)
        with zipfile.ZipFile(path) as archive:
            for item in archive.infolist():
                name = files.check_relative(item.filename)
                if name in sizes:
                    raise BundleError("a name stands twice in the bundle", where=f"{path}/{name}")
                if item.compress_type != zipfile.ZIP_STORED or item.file_size != item.compress_size or item.flag_bits & 0x1:
                    raise BundleError("a bundle file holds plain bytes only", where=f"{path}/{name}", why="it is compressed or encrypted")
                sizes[name] = item.file_size
    except _BAD_ZIP as e:
        raise _damaged(path, str(e)) from None
    except OSError as e:
        raise _archive_failed(e, path) from None
    if sum(sizes.values()) > total:  # stored files cannot overlap in an honest archive
        raise _damaged(path, "it declares more bytes than it has")
    return sizes


def _archive_failed(error: OSError, path: Path) -> FlagtreeError:
    if error.errno == errno.EINVAL:  # an offset in the archive points before its start
        return _damaged(path, "an offset lies outside the file")
    return files.reading_failed(error, str(path))


def _damaged(path: Path, why: str) -> BundleError:
    return BundleError("the bundle is damaged", where=str(path), why=why, hint="copy it again, or build it again")


# -- writing ---------------------------------------------------------------------------------------------------------
def archive_bytes(content: Mapping[str, bytes]) -> bytes:
    """An uncompressed zip whose bytes depend on names and contents alone."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(content):
            item = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            item.create_system = 3  # Unix, whatever this machine is
            item.external_attr = (stat.S_IFREG | 0o644) << 16
            archive.writestr(item, content[name])
    return out.getvalue()


def publish(path: Path, content: Mapping[str, bytes]) -> None:
    """Put the bundle `content` at `path` in one step.  BundleError when what stands there is no bundle; StoreError when
    the place cannot be written.  In both cases nothing that was there has changed."""
    path = Path(os.path.abspath(path))
    as_file = path.suffix == SUFFIX
    _refuse_other(path, as_file)
    with files.writing(path, _HOW):
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path)
        with _temporary(path) as temporary:
            whole = temporary / "bundle"
            if as_file:
                files.write_new(whole, archive_bytes(content), durable=True)
                os.replace(whole, path)
            else:
                _write_folder(whole, content)
                _move_in(whole, path, temporary / "replaced")
            files.sync_folder(path.parent)


def check_one_file(path: Path | None, targets: Sequence[str]) -> None:
    """BundleError when `path` is a file and there is more than one target."""
    if path is not None and path.suffix == SUFFIX and len(targets) > 1:
        raise BundleError("one file cannot hold the bundles of several targets", where=str(path), hint="name a folder with --out")


def check_place(path: Path) -> None:
    """Raise what `publish` would raise for the place itself, before the work that makes a bundle; nothing stays behind."""
    path = Path(os.path.abspath(path))
    _refuse_other(path, path.suffix == SUFFIX)
    with files.writing(path, _HOW):
        path.parent.mkdir(parents=True, exist_ok=True)
        with _temporary(path):
            return


def _refuse_other(path: Path, as_file: bool) -> None:
    if not os.path.lexists(path):
        return
    if as_file and path.is_file():
        try:
            ours = "manifest.json" in open_container(path).sizes
        except BundleError:
            ours = path.stat().st_size == 0
    else:
        ours = not as_file and path.is_dir() and not path.is_symlink() and ((path / "manifest.json").is_file() or not any(path.iterdir()))
    if not ours:
        hint = f"move it away, or name another place ({_HOW})"
        raise BundleError("something that is no bundle stands where the bundle should go", where=str(path), hint=hint)


def _write_folder(folder: Path, content: Mapping[str, bytes]) -> None:
    made = {folder}
    folder.mkdir()
    for name in sorted(content):
        file = folder / files.check_relative(name)
        if file.parent not in made:
            file.parent.mkdir(parents=True, exist_ok=True)
            made.add(file.parent)
        files.write_new(file, content[name], durable=True)
    for made_folder in sorted(made):
        files.sync_folder(made_folder)


def _move_in(whole: Path, path: Path, replaced: Path) -> None:
    try:
        os.rename(whole, path)  # to a free name, or over an empty folder
    except OSError as e:
        if e.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        exchange(whole, path)
        os.rename(whole, replaced)


def exchange(one: Path, other: Path) -> None:
    """Swap two names in one step (Linux: renameat2 with RENAME_EXCHANGE, macOS: renamex_np with RENAME_SWAP).  OSError
    where the system or file system has neither."""
    libc = ctypes.CDLL(None, use_errno=True)
    a, b = os.fsencode(one), os.fsencode(other)
    if hasattr(libc, "renameat2"):
        failed = libc.renameat2(-100, a, -100, b, 2)  # AT_FDCWD, RENAME_EXCHANGE: linux/fs.h
    elif hasattr(libc, "renamex_np"):
        failed = libc.renamex_np(a, b, 2)  # RENAME_SWAP: sys/stdio.h
    else:
        raise OSError(errno.ENOSYS, "this system cannot exchange two folders in one step", str(other))
    if failed:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(other))


# -- what a writer leaves when it is killed --------------------------------------------------------------------------
@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """A folder beside `path`, locked by this process as long as it works in it."""
    while True:
        folder = path.parent / f".{path.name[:80]}.{secrets.token_hex(6)}.building"
        folder.mkdir(mode=0o755)
        try:
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue  # another writer swept it before it was open
        with contextlib.suppress(OSError):  # no locks on this file system: then leftovers stay
            fcntl.flock(handle, fcntl.LOCK_EX)
        if folder.exists():
            break
        os.close(handle)  # another writer swept it before it was locked
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


def _sweep(path: Path) -> None:
    """Remove the folders of killed writers of this bundle: those whose lock is free."""
    for folder in path.parent.glob(f".{_escaped(path.name[:80])}.*.building"):
        try:
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        except OSError:
            pass  # its writer is alive
        finally:
            os.close(handle)


def _escaped(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)
