"""Cumulative distributions as an SVG, so that a benchmark's picture needs no library."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np

WIDTH, HEIGHT = 400, 260  # of a panel's plot
LEFT, TOP, BELOW, BETWEEN = 56, 48, 56, 40
COLOURS = ("#0b6e99", "#d9730d", "#448361", "#9065b0", "#d44c47", "#787774")
SHARES = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0)  # the horizontal lines


@dataclass(frozen=True)
class Panel:
    """One plot: a curve for each series of times."""

    title: str
    series: Mapping[str, Sequence[float]]  # in seconds, each above 0


def write_distributions(path: Path, panels: Sequence[Panel]) -> None:
    """Draw the share of values up to a time, over the time on a logarithmic axis; panels lie side by side."""
    width = LEFT + len(panels) * (WIDTH + BETWEEN)
    height = TOP + HEIGHT + BELOW
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'font-family="sans-serif" font-size="12" fill="#333">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for number, panel in enumerate(panels):
        parts += _panel(panel, LEFT + number * (WIDTH + BETWEEN))
    path.write_text("\n".join([*parts, "</svg>", ""]))


def _panel(panel: Panel, left: float) -> list[str]:
    values = np.concatenate([np.asarray(times) for times in panel.series.values()])
    low, high = math.floor(math.log10(values.min())), math.ceil(math.log10(values.max()))

    def x(seconds: float) -> float:
        return left + WIDTH * (math.log10(seconds) - low) / max(high - low, 1)

    def y(share: float) -> float:
        return TOP + HEIGHT * (1 - share)

    parts = [f'<text x="{left}" y="{TOP - 28}" font-size="14" font-weight="bold">{escape(panel.title)}</text>']
    for share in SHARES:
        parts.append(_line(left, y(share), left + WIDTH, y(share)))
        parts.append(f'<text x="{left - 6}" y="{y(share) + 4:.1f}" text-anchor="end">{share:.0%}</text>')
    for exponent in range(low, high + 1):
        at = x(10.0**exponent)
        parts.append(_line(at, TOP, at, TOP + HEIGHT))
        parts.append(f'<text x="{at:.1f}" y="{TOP + HEIGHT + 18}" text-anchor="middle">{_time(exponent)}</text>')
    for number, (name, times) in enumerate(panel.series.items()):
        colour = COLOURS[number % len(COLOURS)]
        shares = np.linspace(0, 1, 201)
        points = " ".join(f"{x(t):.1f},{y(s):.1f}" for t, s in zip(np.quantile(times, shares), shares, strict=True))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
        at = left + number * WIDTH / len(panel.series)
        parts.append(f'<text x="{at:.1f}" y="{TOP - 10}" fill="{colour}">{escape(name)}</text>')
    return parts


def _line(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="#ddd"/>'


def _time(exponent: int) -> str:
    """A power of ten of seconds, as one says it."""
    if exponent >= 0:
        return f"{10**exponent:,} s"
    return f"{10 ** (exponent + 3):g} ms" if exponent >= -3 else f"{10 ** (exponent + 6):g} µs"
