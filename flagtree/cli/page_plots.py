"""Two plots as SVG text: bytes moved before and after fusion, and kernels under a device's roofline.

The roofline is Williams, Waterman, Patterson, "Roofline: an insightful visual performance model", CACM 52(4), 2009: attainable
operations a second are the lesser of peak and bandwidth times operations a byte.  Every name is escaped; used by page.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from flagtree.cli.table import size

WIDTH, ROW, NAMES = 860, 34, 230  # pixels: the picture, a kernel's two bars, the column of names
BEFORE, AFTER, LINE, INK = "#c9ced6", "#2f6fb5", "#b5473c", "#333"


@dataclass(frozen=True)
class Point:
    """A kernel at the reference sizes: operations of one launch, bytes of one launch after and before fusion."""

    name: str
    operations: int
    bytes: int
    before: int


def _short(name: str, length: int) -> str:
    return escape(name if len(name) <= length else f"{name[: length - 1]}…")


def traffic(rows: Sequence[tuple[str, int, int]]) -> str:
    """Bars of (kernel, bytes before fusion, bytes after), all its launches together, on one scale."""
    largest = max((before for _, before, _ in rows), default=0)
    if not largest:
        return ""
    room = WIDTH - NAMES - 180
    out = [f'<svg viewBox="0 0 {WIDTH} {ROW * len(rows) + 6}" role="img" aria-label="bytes before and after fusion">']
    for k, (name, before, after) in enumerate(rows):
        y = k * ROW + 4
        old, new = (max(1.0, room * count / largest) for count in (before, after))
        out.append(f'<text x="{NAMES - 8}" y="{y + 16}" text-anchor="end">{_short(name, 32)}</text>')
        out.append(f'<rect x="{NAMES}" y="{y}" width="{old:.1f}" height="11" fill="{BEFORE}"/>')
        out.append(f'<rect x="{NAMES}" y="{y + 13}" width="{new:.1f}" height="11" fill="{AFTER}"/>')
        out.append(f'<text x="{NAMES + old + 6:.1f}" y="{y + 14}" class="small">{size(before)} → {size(after)}</text>')
    return "\n".join([*out, "</svg>"])


def roofline(points: Sequence[Point], bandwidth: float, peak: float) -> str:
    """Kernels by operations a byte, each at what the device can reach there; `bandwidth` bytes and `peak` f32 operations a second.

    A thin ring stands where the same operations would be without fusion.
    """
    ridge = peak / bandwidth if peak else 0.0
    intensities = [p.operations / count for p in points for count in (p.bytes, p.before) if count and p.operations]
    low = math.floor(math.log10(min([*intensities, 0.1])))
    high = math.ceil(math.log10(max([*intensities, ridge * 2, 1.0])))
    top = math.ceil(math.log10(peak or bandwidth * 10**high))
    bottom = math.floor(math.log10(bandwidth * 10**low))
    height, left, right, under = 380, 90, WIDTH - 250, 340

    def x(intensity: float) -> float:
        return left + (right - left) * (math.log10(intensity) - low) / (high - low)

    def y(rate: float) -> float:
        return under - (under - 14) * (math.log10(rate) - bottom) / (top - bottom)

    def reached(intensity: float) -> float:
        return min(peak, bandwidth * intensity) if peak else bandwidth * intensity

    out = [f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="roofline">']
    for power in range(low, high + 1):
        out.append(f'<line x1="{x(10**power):.1f}" x2="{x(10**power):.1f}" y1="14" y2="{under}" class="grid"/>')
        out.append(f'<text x="{x(10**power):.1f}" y="{under + 16}" text-anchor="middle" class="small">{10.0**power:g}</text>')
    for power in range(bottom, top + 1):
        out.append(f'<line x1="{left}" x2="{right}" y1="{y(10**power):.1f}" y2="{y(10**power):.1f}" class="grid"/>')
        out.append(f'<text x="{left - 6}" y="{y(10**power) + 4:.1f}" text-anchor="end" class="small">{_rate(10.0**power)}</text>')
    ends = [10.0**low, *([ridge] if peak else []), 10.0**high]
    path = " ".join(f"{x(i):.1f},{y(reached(i)):.1f}" for i in ends)
    out.append(f'<polyline points="{path}" fill="none" stroke="{LINE}" stroke-width="2"/>')
    out.append(f'<text x="{(left + right) / 2:.0f}" y="{under + 34}" text-anchor="middle">operations a byte</text>')
    drawn = [p for p in points if p.operations]
    for k, p in enumerate(sorted(drawn, key=lambda p: p.operations / p.bytes), 1):
        now, then = p.operations / p.bytes, p.operations / max(p.before, 1)
        if p.before:
            out.append(f'<circle cx="{x(then):.1f}" cy="{y(reached(then)):.1f}" r="4" fill="none" stroke="{INK}" opacity="0.5"/>')
        out.append(f'<circle cx="{x(now):.1f}" cy="{y(reached(now)):.1f}" r="5" fill="{AFTER}"/>')
        out.append(f'<text x="{x(now) + 6:.1f}" y="{y(reached(now)) - 7:.1f}" class="small">{k}</text>')
        out.append(f'<text x="{right + 16}" y="{10 + 16 * k}" class="small">{k} {_short(p.name, 26)}  {now:.2g}</text>')
    return "\n".join([*out, "</svg>"])


def _rate(operations: float) -> str:
    for unit, factor in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if operations >= factor:
            return f"{operations / factor:g} {unit}op/s"
    return f"{operations:g} op/s"
