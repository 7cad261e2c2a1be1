"""The texts of `flagtree explain`: one Markdown file a topic, in docs/explain/ of a checkout and inside an installed wheel.

A topic's name is its file's name.  Nothing is printed here; cli/explain.py shows the text and the evidence in a bundle.
"""

from __future__ import annotations

from pathlib import Path

from flagtree.errors import FlagtreeError, UnknownName


def folder() -> Path:
    """Where the texts are: beside the package in a wheel, in docs/ of a checkout.  Raises FlagtreeError when neither is there."""
    package = Path(__file__).resolve().parent.parent
    for place in (package / "_explain", package.parent / "docs" / "explain"):
        if place.is_dir():
            return place
    raise FlagtreeError("the texts of `flagtree explain` are missing", where=str(package / "_explain"), hint="reinstall the package")


def topics() -> dict[str, str]:
    """Name to the first line of each text, without the heading mark."""
    found = {}
    for path in sorted(folder().glob("*.md")):
        with path.open(encoding="utf-8") as text:
            found[path.stem] = text.readline().removeprefix("# ").strip()
    return found


def read_topic(name: str) -> str:
    """The text of one topic.  Raises UnknownName with the closest topics."""
    known = topics()
    if name not in known:
        raise UnknownName("topic", name, known, hint="`flagtree explain` lists them")
    return (folder() / f"{name}.md").read_text(encoding="utf-8")
