"""The table of settings: values are read when asked for, and a bad one names its variable."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from flagtree.errors import FlagtreeError, UnknownName
from flagtree.settings import Settings, settings


def test_default_cache_folder_follows_the_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("FLAGTREE_CACHE_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert settings.cache_dir == tmp_path / ".cache" / "flagtree"
    monkeypatch.setenv("FLAGTREE_CACHE_DIR", "~/größe und blanks")
    assert settings.cache_dir == tmp_path / "größe und blanks"


def test_values_are_read_at_every_access(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLAGTREE_DEBUG", "3")
    assert settings.debug == 3
    monkeypatch.setenv("FLAGTREE_DEBUG", "")
    assert settings.debug == 0


def test_layers_are_split_like_a_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLAGTREE_CACHE_LAYERS", os.pathsep.join(["/one", "", "/two words"]))
    assert settings.cache_layers == (Path("/one"), Path("/two words"))


@pytest.mark.parametrize(
    ("variable", "value", "name"),
    [
        ("FLAGTREE_DEBUG", "6", "debug"),
        ("FLAGTREE_DEBUG", "-1", "debug"),
        ("FLAGTREE_DEBUG", "²", "debug"),
        ("FLAGTREE_ON_ERROR", "ignore", "on_error"),
        ("FLAGTREE_FUEL", "many", "fuel"),
        ("FLAGTREE_FUEL", "9" * 5000, "fuel"),
        ("FLAGTREE_JOBS", "0", "jobs"),
    ],
)
def test_a_bad_value_names_its_variable(monkeypatch: pytest.MonkeyPatch, variable: str, value: str, name: str) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(FlagtreeError, match=variable):
        getattr(settings, name)


def test_override_is_undone_and_knows_its_names() -> None:
    before = settings.debug
    with settings.override(debug=4, fuel=7):
        assert (settings.debug, settings.fuel) == (4, 7)
        with settings.override(fuel=None):
            assert (settings.debug, settings.fuel) == (4, None)
    assert (settings.debug, settings.fuel) == (before, None)
    with pytest.raises(UnknownName, match="fuel"), settings.override(fule=1):
        pass


def test_every_row_has_help_and_its_own_variable() -> None:
    rows = Settings.table()
    assert len({r.variable for r in rows}) == len(rows) == 9
    assert all(len(r.help) > 15 for r in rows)


def test_only_what_changes_the_result_enters_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    before = settings.key_factors()
    for variable, value in {"FLAGTREE_CACHE_DIR": "/elsewhere", "FLAGTREE_JOBS": "3", "FLAGTREE_DEBUG": "5"}.items():
        monkeypatch.setenv(variable, value)
    assert settings.key_factors() == before
    monkeypatch.setenv("FLAGTREE_FUEL", "12")
    assert settings.key_factors() == {**before, "fuel": 12}
