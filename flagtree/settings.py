"""The settings of flagtree, and the only place that reads the environment.

One row a setting: its variable, type, default, help, and whether it enters compile keys.  A value is read when the
attribute is read, so that a test, a command-line option or a worker process sees what is true now.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Generic, TypeVar, overload

from flagtree.errors import FlagtreeError, UnknownName

T = TypeVar("T")


class Setting(Generic[T]):
    """One row of the table.  `read` turns the variable's text into a value and raises ValueError(why) for a bad one;
    `enters_key`: the value changes what the compiler makes, so it is a key factor."""

    def __init__(self, variable: str, read: Callable[[str], T], default: Callable[[], T], help: str, *, enters_key: bool = False) -> None:
        self.variable, self.read, self.default, self.help, self.enters_key = variable, read, default, help, enters_key
        self.name = ""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, instance: None, owner: type) -> Setting[T]: ...
    @overload
    def __get__(self, instance: Settings, owner: type) -> T: ...
    def __get__(self, instance: Settings | None, owner: type) -> Setting[T] | T:
        if instance is None:
            return self
        if self.name in instance._overrides:
            return instance._overrides[self.name]  # type: ignore[return-value]
        text = os.environ.get(self.variable, "")
        if not text:  # an empty variable is an unset one, as in a shell
            return self.default()
        try:
            return self.read(text)
        except ValueError as e:
            where = f"{self.variable}={text!r}"
            raise FlagtreeError(f"the variable {self.variable} has a bad value", where=where, why=str(e), hint=self.help) from None


def _path(text: str) -> Path:
    if "\0" in text:
        raise ValueError("a path cannot hold a null character")
    return Path(os.path.abspath(os.path.expanduser(text)))


def _paths(text: str) -> tuple[Path, ...]:
    return tuple(_path(part) for part in text.split(os.pathsep) if part)


def _home_cache() -> Path:
    try:
        return Path.home() / ".cache" / "flagtree"
    except RuntimeError as e:
        raise FlagtreeError("there is no home folder for the cache", why=str(e), hint="set FLAGTREE_CACHE_DIR to a folder") from None


def _integer(lo: int, hi: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not (text.isascii() and text.isdigit() and lo <= int(text[:20]) <= hi):
            raise ValueError(f"not a whole number from {lo} to {hi}")
        return int(text)

    return read


def _choice(*known: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in known:
            raise ValueError(f"not one of: {', '.join(known)}")
        return text

    return read


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _nothing() -> None:
    return None


class Settings:
    """The table.  `override` sets values for the length of a `with` block, above the environment."""

    cache_dir = Setting("FLAGTREE_CACHE_DIR", _path, _home_cache, "a folder for the store; default ~/.cache/flagtree")
    cache_layers = Setting("FLAGTREE_CACHE_LAYERS", _paths, lambda: (), "read-only stores below the cache folder, joined as in PATH")
    debug = Setting("FLAGTREE_DEBUG", _integer(0, 5), lambda: 0, "0 silent, 1 summary, 2 passes, 3 IR by pass, 4 source, 5 all stages")
    on_error = Setting(
        "FLAGTREE_ON_ERROR",
        _choice("extern", "raise"),
        lambda: "extern",
        "extern: what fails inside becomes an extern with its reason; raise: it raises",
        enters_key=True,
    )
    cxx: Setting[str | None] = Setting("FLAGTREE_CXX", str, _nothing, "the C++ compiler: a path or a name in PATH")
    fuel: Setting[int | None] = Setting(
        "FLAGTREE_FUEL", _integer(0, 10**9), _nothing, "stop after this many rewrites; default no limit", enters_key=True
    )
    jobs = Setting("FLAGTREE_JOBS", _integer(1, 1024), _processors, "how many processes compile at once; default all processors")
    triton31_python: Setting[Path | None] = Setting(
        "FLAGTREE_TRITON31_PYTHON", _path, _nothing, "a Python with stock Triton 3.1, for the gate that stands for MetaX's fork"
    )
    maca_path: Setting[Path | None] = Setting("MACA_PATH", _path, _nothing, "where MetaX's SDK is installed")

    def __init__(self) -> None:
        self._overrides: dict[str, object] = {}

    @classmethod
    def table(cls) -> tuple[Setting, ...]:
        """Every row, in order of declaration."""
        return tuple(v for v in vars(cls).values() if isinstance(v, Setting))

    def key_factors(self) -> dict[str, object]:
        """The values that change what the compiler makes, by name."""
        return {s.name: getattr(self, s.name) for s in self.table() if s.enters_key}

    @staticmethod
    def child_environment(unless_set: Mapping[str, str] = MappingProxyType({}), **more: str) -> dict[str, str]:
        """The environment for a process that we start: ours, what it lacks of `unless_set`, and `more` in any case."""
        return {**unless_set, **os.environ, **more}

    @contextlib.contextmanager
    def override(self, **values: object) -> Iterator[None]:
        """Set values for a block: what a command-line option uses.  UnknownName for a name outside the table."""
        known = {s.name for s in self.table()}
        for name in values:
            if name not in known:
                raise UnknownName("setting", name, known)
        before = self._overrides
        self._overrides = {**before, **values}
        try:
            yield
        finally:
            self._overrides = before


settings = Settings()
