"""`flagtree inspect BUNDLE --html FILE`: one page that shows a bundle and needs nothing else, neither network nor script of another.

Everything is read from the verified bundle and escaped: a bundle is hostile until trusted, and looking at it runs none of its code.
The template is `templates/bundle.html.j2`; the plots are made in page_plots.py.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flagtree.artifact.bundle import Bundle, inspect
from flagtree.cli.page_plots import Point, roofline, traffic
from flagtree.cli.table import short_ops, size, stored_report
from flagtree.errors import FlagtreeError, IRError, UnknownName
from flagtree.ir.program import Compute, Kernel, Reduce, Scan, defined, operands
from flagtree.ir.text import parse_program
from flagtree.targets import find_target

_NO_ARITHMETIC = frozenset({"cast", "where", "index"})
SHOWN = 400_000  # characters of one text; what is longer is cut, and the page says so
SOURCES = ("kernel.py", "kernel.cpp")
# The text closest to the machine, best first; a CPU's objects have none.
DEVICE = ("aligned.ptx", "generic.ptx", "aligned.amdgcn", "generic.amdgcn", "aligned.llir", "generic.llir", "aligned.ttir", "generic.ttir")


@dataclass(frozen=True)
class Box:
    """One step in the picture: a kernel, an extern, or a group of steps that runs `times` times."""

    kind: str
    title: str
    lines: Sequence[str] = ()
    anchor: str = ""
    times: int = 1
    inner: Sequence[Box] = ()


@dataclass(frozen=True)
class PartPage:
    """One part: its picture, its plots and its tables."""

    name: str
    totals: Sequence[str]
    boxes: Sequence[Box]
    externs: Sequence[tuple[str, str, int, str]]
    refused: Sequence[str]
    traffic: str = ""
    roofline: str = ""
    no_roofline: str = ""


@dataclass(frozen=True)
class KernelPage:
    """One distinct kernel: `texts` are (heading, text) of source, IR and device code, `checked` the certificate's lines."""

    digest: str
    name: str
    tier: str
    missing: str
    ops: str
    texts: Sequence[tuple[str, str]]
    files: Sequence[tuple[str, str]]
    facts: Sequence[str]
    verdict: str
    checked: Mapping[str, str] = field(default_factory=dict)


def write_page(bundle: Bundle, out: Path, trusted: bool) -> None:
    """Write the page to `out`, which is replaced in one step.  BundleError for a damaged bundle, FlagtreeError for an `out` that
    cannot be written."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    facts = inspect(bundle)
    names = _names(facts)
    kernels = [_kernel(bundle, digest, facts, names) for digest in facts["kernels"]]
    parts = [_part(bundle, name, facts, names) for name in facts["parts"]]
    template = Environment(loader=PackageLoader("flagtree.cli"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
                           lstrip_blocks=True).get_template("bundle.html.j2")  # fmt: skip
    heading = {
        "digest": facts["digest"], "size": f"{size(facts['bytes'])} in {len(facts['files'])} files",
        "built by": ", ".join(f"{name} {version}" for name, version in facts["versions"].items()),
        "kernels": f"{len(kernels)} distinct: " + ", ".join(f"{count} at tier {tier}" for tier, count in facts["tiers"].items()),
        "trusted": "yes, built by this machine's store" if trusted else "no; running it needs its digest named",
        **({"levels": ", ".join(facts["libraries"])} if facts["libraries"] else {}),
    }  # fmt: skip
    missing = list(dict.fromkeys(k.missing for k in kernels if k.missing))
    text = template.render(name=facts["name"], target=facts["target"], heading=heading, missing=missing, parts=parts, kernels=kernels,
                           evidence=_evidence(facts["certificate"]))  # fmt: skip
    _publish(out, text)


def _publish(out: Path, text: str) -> None:
    try:
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=".page-") as folder:
            (Path(folder) / "page").write_text(text, encoding="utf-8")
            os.replace(Path(folder) / "page", out)
    except OSError as error:
        raise FlagtreeError("the page cannot be written", where=str(out), why=str(error), hint="name another file with --html") from None


def _names(facts: Mapping[str, Any]) -> dict[str, str]:
    """Kernel digest to the name that the compile report gives it."""
    reports = filter(None, (stored_report(facts["coverage"].get(part)) for part in facts["parts"]))
    return {row.digest: row.name for report in reports for row in report.kernels}


# -- one part --------------------------------------------------------------------------------------------------------
def _part(bundle: Bundle, name: str, facts: Mapping[str, Any], names: Mapping[str, str]) -> PartPage:
    launch, summary = bundle.part(name), facts["parts"][name]
    report = stored_report(facts["coverage"].get(name))
    rows = {row.digest: row for row in report.kernels} if report else {}
    told = {d: [short_ops(r.ops), f"{size(r.bytes_before)} before, {size(r.bytes_after)} after"] for d, r in rows.items()}
    boxes = list(_boxes(launch.get("steps", ()), names, told))
    refused = [str(r) for r in (facts["coverage"].get(name) or {}).get("refused", ())]
    if report is None:
        externs = [(e["callee"], e["reason"], e["count"], "-") for e in summary["externs"]]
        return PartPage(name, [f"{summary['launches']} launches, {summary['weights']} weights by name"], boxes, externs, refused)
    at = ", ".join(f"{k} {v}" for k, v in report.reference.items())
    totals = [f"{report.launches_total} launches of kernels: {size(report.bytes_before)} before fusion, {size(report.bytes_after)} after",
              f"{report.calls_extern} calls of externs: {size(report.bytes_extern)}", f"{report.weights} weights by name"]  # fmt: skip
    if report.launches_per_layer is not None:
        totals.append(f"a layer: {report.launches_per_layer} launches, {size(report.bytes_before_per_layer)} before and "
                      f"{size(report.bytes_after_per_layer)} after, externs included")  # fmt: skip
    totals.append(f"bytes at {at}")
    externs = [(e.callee, e.reason, e.count, size(e.bytes)) for e in report.externs]
    picture, why = _roofline(bundle, report, rows, launch)
    bars = traffic([(f"{r.name} × {r.launches}", r.bytes_before * r.launches, r.bytes_after * r.launches) for r in report.kernels])
    return PartPage(name, totals, boxes, externs, refused, bars, picture, why)


def _boxes(steps: Sequence[Mapping[str, Any]], names: Mapping[str, str], told: Mapping[str, Sequence[str]]) -> Iterator[Box]:
    for step in steps:
        if "repeat" in step:
            yield Box("repeat", f"{step['repeat']} times", times=step["repeat"], inner=list(_boxes(step["steps"], names, told)))
        elif "kernel" in step:
            digest = str(step["kernel"])
            above = [f"above {step['above'].get('limit', 'its limit')}: {step['above']['extern']['extern']}"] if "above" in step else []
            yield Box("kernel", names.get(digest, str(step.get("name", digest[:16]))), [*told.get(digest, ()), *above], f"k{digest[:16]}")
        else:
            yield Box("extern", str(step.get("extern", "?")), [_weight(step), str(step.get("reason", ""))])


def _weight(step: Mapping[str, Any]) -> str:
    """Which weight a call reads, by the module that owns it: `mlp.gate_proj`."""
    names = [str(a["buffer"]) for a in step.get("args", ()) if isinstance(a, dict) and "buffer" in a]
    found = next((name for name in names if ".weight" in name), "")
    return ".".join(found.partition(".weight")[0].split(".")[-2:])


# -- roofline --------------------------------------------------------------------------------------------------------
def operations(kernel: Kernel, symbols: Mapping[str, int]) -> int:
    """Arithmetic of the IR: each compute, reduction and scan step once for every point of the axes that its value varies along; casts,
    choices and index arithmetic are none."""
    extents = {axis.name: axis.extent.evaluate(symbols) for axis in kernel.axes}
    varies: dict[str, frozenset[str]] = {name: frozenset({name}) for name in extents}
    total = 0
    for op in kernel.body:
        along = frozenset().union(*(varies.get(name, frozenset()) for name in operands(op)))
        if isinstance(op, (Reduce, Scan)) or (isinstance(op, Compute) and op.op not in _NO_ARITHMETIC):
            total += math.prod(extents[axis] for axis in along)
        varies |= dict.fromkeys(defined(op), along - frozenset(op.axes) if isinstance(op, Reduce) else along)
    return total


def _roofline(bundle: Bundle, report: Any, rows: Mapping[str, Any], launch: Mapping[str, Any]) -> tuple[str, str]:
    """The plot, or why there is none."""
    try:
        target = find_target(bundle.manifest.target)
    except UnknownName:
        return "", f"this flagtree does not know the target {bundle.manifest.target}"
    if not target.bandwidth:
        return "", f"no public figure of the memory bandwidth of {target.name} stands in its file of facts"
    points = []
    for digest, symbols in _launched(launch["steps"], report.reference).items():
        row = rows.get(digest)
        kernel = _kernel_ir(bundle, digest)
        if row is None or kernel is None or not row.bytes_after:
            continue
        argument = dict(zip((f"n{i}" for i in range(len(symbols))), symbols))
        points.append(Point(row.name, operations(kernel, argument), row.bytes_after, row.bytes_before))
    if not points:
        return "", "no kernel of this part tells its sizes"
    return roofline(points, target.bandwidth, target.peak), target.facts_from.get("bandwidth", "")


def _launched(steps: Sequence[Mapping[str, Any]], reference: Mapping[str, int]) -> dict[str, list[int]]:
    """Kernel digest to the sizes of its first launch at the reference, where all of them are sizes of the call."""
    found: dict[str, list[int]] = {}
    for step in steps:
        if "repeat" in step:
            found = {**_launched(step["steps"], reference), **found}
        elif "kernel" in step and all(isinstance(s, str) and s in reference for s in step.get("symbols", ())):
            found.setdefault(str(step["kernel"]), [reference[s] for s in step.get("symbols", ())])
    return found


def _kernel_ir(bundle: Bundle, digest: str) -> Kernel | None:
    name = f"kernels/{digest[:16]}/kernel.ir"
    if name not in bundle.manifest.files:
        return None
    try:
        steps = parse_program(bundle.read(name).decode()).steps
    except (IRError, UnicodeDecodeError):  # of another release; the page shows the text all the same
        return None
    return steps[0] if len(steps) == 1 and isinstance(steps[0], Kernel) else None


# -- one kernel ------------------------------------------------------------------------------------------------------
def _kernel(bundle: Bundle, digest: str, facts: Mapping[str, Any], names: Mapping[str, str]) -> KernelPage:
    folder = f"kernels/{digest[:16]}/"
    listed = facts["kernels"][digest]
    sizes = {name.removeprefix(folder): count for name, count in facts["files"].items() if name.startswith(folder)}
    source = next((name for name in SOURCES if name in sizes), None)
    device = next((name for name in DEVICE if name in sizes), None)
    texts = [(f"{heading}: {name}", _text(bundle, folder + name)) for heading, name in
             (("source", source), ("IR", "kernel.ir" if "kernel.ir" in sizes else None), ("device code", device)) if name]  # fmt: skip
    if device is None:
        texts.append(("device code", "machine code only:\n" + "\n".join(f"{n}  {size(s)}" for n, s in sizes.items() if n.endswith(".o"))))
    record = ((facts["certificate"] or {}).get("kernels") or {}).get(digest) or {}
    told = {variant: facts for variant, facts in listed["facts"].items() if isinstance(facts, dict)}
    numbers = [f"{variant}: " + ", ".join(f"{k} {v}" for k, v in facts.items()) for variant, facts in told.items()]
    return KernelPage(digest, names.get(digest, digest[:16]), listed["tier"], listed["missing"], short_ops(record.get("ops", ())), texts,
                      [(n, size(s)) for n, s in sizes.items()], numbers, str(record.get("verdict", "not executed")), _checked(record))


def _evidence(certificate: Any) -> str:
    """What stands above the certificate's table; "" where there is no certificate."""
    if not isinstance(certificate, dict):
        return ""
    versions = certificate.get("versions")
    tools = ", ".join(f"{name} {version}" for name, version in versions.items()) if isinstance(versions, dict) else "not said"
    return f"Form: {certificate.get('form', 'not said')}. Made with {tools}."


def _checked(record: Mapping[str, Any]) -> dict[str, str]:
    """What the certificate says of a kernel, in words."""
    outputs = [output for run in record.get("runs", ()) for output in run.get("outputs", {}).values()]
    if not outputs:
        return {}
    ulp = [o["max_ulp"] for o in outputs if isinstance(o.get("max_ulp"), (int, float))]
    shares = [o["equal_to_eager"] for o in outputs if isinstance(o.get("equal_to_eager"), (int, float))]
    return {
        "executed": ", ".join(map(str, record.get("executed", ()))), "eager": str(record.get("eager", "")),
        "runs": str(len(record["runs"])),
        "gate": ", ".join(sorted({str(o.get("gate", "")) for o in outputs})),
        "largest error": f"{max(ulp):.3g} ULP" if ulp else "-",
        "equal to eager": f"{min(shares):.1%} of the elements at least" if shares else "-",
    }  # fmt: skip


def _text(bundle: Bundle, name: str) -> str:
    text = bundle.read(name).decode("utf-8", "replace")
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}\n… {len(text) - SHOWN} characters more in {name}"
