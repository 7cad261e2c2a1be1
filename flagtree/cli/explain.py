"""`flagtree explain`: a topic in plain words, and for some topics the evidence in a bundle.

The texts are docs/explain/*.md; the evidence is read and verified, and none of the bundle's code runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flagtree.errors import FlagtreeError

if TYPE_CHECKING:
    from flagtree.artifact.bundle import Bundle

EXAMPLES = """
**Examples**

`flagtree explain` lists the topics.

`flagtree explain tiers` tells what `source`, `ttir`, `llir` and `binary` mean.

`flagtree explain fusion bundles/qwen3-metax` lists what was not fused in that bundle, and why.

`flagtree explain extern bundles/qwen3-metax` lists the calls that flagtree did not generate, and why.
"""


def run(
    topic: Annotated[str | None, typer.Argument(help="A topic; without it they are listed.", show_default=False)] = None,
    bundle: Annotated[Path | None, typer.Argument(help="A bundle to take the evidence from.", show_default=False)] = None,
) -> None:
    """Explain a word of flagtree, or show the evidence for it in a bundle."""
    from flagtree.cli import topics

    if topic is None:
        for name, title in topics.topics().items():
            typer.echo(f"{name:<12} {title}")
        return
    text = topics.read_topic(topic)
    if bundle is None:
        _print_markdown(text)
        for line in _refused_graphs() if topic == "extern" else ():
            typer.echo(line)
        return
    evidence = EVIDENCE.get(topic)
    if evidence is None:
        raise FlagtreeError(f"a bundle holds no evidence for '{topic}'", why=f"evidence exists for: {', '.join(sorted(EVIDENCE))}",
                            hint=f"`flagtree explain {topic}` explains the word")
    from flagtree.artifact.bundle import open_bundle

    opened = open_bundle(bundle)
    opened.verify()
    for line in evidence(opened):
        typer.echo(line)


def _print_markdown(text: str) -> None:
    from rich.console import Console
    from rich.markdown import Markdown

    console = Console()
    if console.is_terminal:
        console.print(Markdown(text))
    else:
        typer.echo(text, nl=False)


def _externs(bundle: Bundle) -> Iterator[str]:
    from flagtree.artifact.bundle import summarise

    for part in bundle.manifest.parts:
        rows = summarise(bundle.part(part))["externs"]
        yield f"{part}: {sum(row['count'] for row in rows)} extern calls"
        for row in sorted(rows, key=lambda r: (-r["count"], r["callee"])):
            yield f"  {row['count']:>5}  {row['callee']}: {row['reason'] or 'no reason was recorded'}"


def _refused_graphs() -> Iterator[str]:
    """Graphs of torch.compile that the store keeps as refused: each runs whole, as one extern."""
    from flagtree.artifact.store import Store

    reasons = Counter(str(meta["refused"]) for meta in Store().stored("graph") if "refused" in meta)
    if reasons:
        yield "\nGraphs of torch.compile in this store that run whole, as one extern:"
    yield from (f"  {count:>5}  {reason}" for reason, count in reasons.most_common())


def _refusals(bundle: Bundle) -> Iterator[str]:
    for part in bundle.manifest.parts:
        promised = bundle.manifest.coverage.get(part)
        refused = promised.get("refused") if isinstance(promised, dict) else None
        if refused is None:
            yield f"{part}: refusals were not recorded when this bundle was built"
            continue
        yield f"{part}: {len(refused)} refused"
        for line in refused:
            yield f"  {line}"


def _tiers(bundle: Bundle) -> Iterator[str]:
    for digest, kernel in sorted(bundle.manifest.kernels.items()):
        beyond = f"; missing: {kernel.missing}" if kernel.missing else ""
        yield f"{digest[:16]}  {kernel.tier}{beyond}"


def _trust(bundle: Bundle) -> Iterator[str]:
    from flagtree.artifact.trust import is_built_here

    yield f"digest {bundle.digest}"
    if is_built_here(bundle.digest):
        yield "trusted: this machine's store built it"
    else:
        yield f"not trusted here; if you trust where it comes from: flagtree.load(path, trust='{bundle.digest}')"


def _certificate(bundle: Bundle) -> Iterator[str]:
    certificate = bundle.certificate()
    if certificate is None:
        yield "this bundle has no certificate"
        return
    yield f"for bundle {bundle.digest}"
    yield from _nested(certificate.evidence, 1)


def _nested(value: Mapping[str, Any], depth: int) -> Iterator[str]:
    for name, inner in value.items():
        if isinstance(inner, Mapping):
            yield f"{'  ' * depth}{name}"
            yield from _nested(inner, depth + 1)
        elif isinstance(inner, list) and any(isinstance(entry, Mapping) for entry in inner):
            for number, entry in enumerate(inner, 1):
                yield from _nested({f"{name} {number}": entry}, depth)
        else:
            yield f"{'  ' * depth}{name}: {', '.join(map(str, inner)) if isinstance(inner, list) else inner}"


EVIDENCE: Mapping[str, Callable[[Bundle], Iterator[str]]] = {
    "extern": _externs, "fusion": _refusals, "tiers": _tiers, "trust": _trust, "certificate": _certificate,
}
