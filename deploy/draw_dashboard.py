"""Draws the panels of deploy/grafana/mxgpt.json from a running Prometheus, as an SVG: a picture without a Grafana.

python -m deploy.draw_dashboard --prometheus http://127.0.0.1:9090 --minutes 5 --out docs/dashboard.svg

Queries, titles, units and places are the dashboard's own; colours and fonts are not Grafana's. What each panel shows is
what Prometheus answers; a panel without data says so.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

ROOT = Path(__file__).parents[1]
DASHBOARD = ROOT / "deploy/grafana/mxgpt.json"

COLUMN, LINE, GAP = 58, 26, 8  # pixels: of the dashboard's grid of 24 columns, and between panels
HEAD, FOOT = 46, 34
COLOURS = ("#73bf69", "#f2cc0c", "#5794f2", "#ff9830", "#f2495c", "#b877d9", "#8ab8ff", "#96d98d")
NUM_POINTS = 160
MAX_LEGEND_CHARACTERS = 62


@dataclass(frozen=True)
class Line:
    """One series: its name and its points, (seconds, value)."""

    name: str
    points: list[tuple[float, float]]


class Prometheus:
    """Answers queries over one span of time.

    Args:
        url: of its HTTP API, without a path.
        start, end: seconds since 1970.
    """

    def __init__(self, url: str, start: float, end: float) -> None:
        self.start = start
        self.end = end
        self._url = url.rstrip("/")

    def lines(self, target: dict[str, Any]) -> list[Line]:
        """The series of one target of a panel."""
        interval = "30s"  # what Grafana puts there: no shorter than four scrapes, here of 5 s at most
        query = {
            "query": target["expr"].replace("$__rate_interval", interval),
            "start": f"{self.start:.3f}",
            "end": f"{self.end:.3f}",
            "step": f"{max(1.0, (self.end - self.start) / NUM_POINTS):.3f}",
        }
        url = f"{self._url}/api/v1/query_range?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(url, timeout=30) as answer:
            found = json.load(answer)
        assert found["status"] == "success", found
        return [_line(series, target["legendFormat"]) for series in found["data"]["result"]]


def _line(series: dict[str, Any], legend: str) -> Line:
    name = legend
    for label, value in series["metric"].items():
        name = name.replace("{{" + label + "}}", value)
    points = [(when, float(value)) for when, value in series["values"]]
    return Line(name, [(when, value) for when, value in points if math.isfinite(value)])


def draw(dashboard: dict[str, Any], prometheus: Prometheus, caption: str) -> str:
    """The SVG."""
    panels = dashboard["panels"]
    bottom = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels)
    width, height = 24 * COLUMN + GAP, HEAD + bottom * LINE + FOOT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'font-family="Inter, Helvetica, Arial, sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="#111217"/>',
        _text(GAP + 4, 29, dashboard["title"], "#d8d9da", size=19),
        _text(GAP + 4, height - 13, caption, "#9fa7b3"),
    ]
    for panel in panels:
        grid = panel["gridPos"]
        left, top = GAP + grid["x"] * COLUMN, HEAD + grid["y"] * LINE
        if panel["type"] == "row":
            parts.append(_text(left + 2, top + 18, panel["title"], "#d8d9da", size=13))
            continue
        box = (left, top, grid["w"] * COLUMN - GAP, grid["h"] * LINE - GAP)
        lines = [line for target in panel["targets"] for line in prometheus.lines(target)]
        parts.append(f'<rect x="{left}" y="{top}" width="{box[2]}" height="{box[3]}" rx="3" fill="#181b1f"/>')
        parts.append(_text(left + 9, top + 18, panel["title"], "#d8d9da", size=12))
        parts += (_stat if panel["type"] == "stat" else _chart)(panel, lines, box, prometheus)
    return "\n".join([*parts, "</svg>\n"])


def _stat(panel: dict[str, Any], lines: list[Line], box: tuple[int, ...], prometheus: Prometheus) -> list[str]:
    left, top, width, height = box
    points = lines[0].points if lines else []
    if not points:
        return [_text(left + width / 2, top + height / 2 + 8, "no data", "#6e7683", anchor="middle")]
    highest = max(value for _, value in points) or 1.0
    place = _Place(left, top + height * 0.66, width, height * 0.34, prometheus, highest)
    unit = panel["fieldConfig"]["defaults"]["unit"]
    return [
        _area(place, points, [0.0] * len(points), COLOURS[2], 0.25),
        _text(left + width / 2, top + height / 2 + 8, _value(points[-1][1], unit), "#d8d9da", 24, "middle"),
    ]


def _chart(panel: dict[str, Any], lines: list[Line], box: tuple[int, ...], prometheus: Prometheus) -> list[str]:
    left, top, width, height = box
    lines = [line for line in lines if line.points]
    if not lines:
        return [_text(left + width / 2, top + height / 2, "no data", "#6e7683", anchor="middle")]
    defaults = panel["fieldConfig"]["defaults"]
    stacked = defaults["custom"]["stacking"]["mode"] == "normal"
    totals: dict[float, float] = {}
    bases: list[list[float]] = []
    for line in lines:
        bases.append([totals.get(when, 0.0) if stacked else 0.0 for when, _ in line.points])
        for when, value in line.points:
            totals[when] = totals.get(when, 0.0) + value if stacked else max(value, totals.get(when, 0.0))
    ticks = _ticks(defaults.get("max", max(totals.values())), 1024.0 if defaults["unit"] == "bytes" else 1000.0)
    place = _Place(left + 52, top + 30, width - 66, height - 72, prometheus, ticks[-1])
    parts: list[str] = []
    for tick in ticks:
        parts.append(
            f'<line x1="{place.left}" x2="{place.left + place.width}" y1="{place.y(tick):.1f}" '
            f'y2="{place.y(tick):.1f}" stroke="#2b2f36"/>'
        )
        parts.append(_text(place.left - 6, place.y(tick) + 4, _value(tick, defaults["unit"]), "#9fa7b3", 10, "end"))
    for share in (0.0, 0.5, 1.0):
        when = prometheus.start + share * (prometheus.end - prometheus.start)
        clock = time.strftime("%H:%M:%S", time.gmtime(when))
        anchor = ("start", "middle", "end")[int(share * 2)]
        parts.append(_text(place.x(when), place.top + place.height + 15, clock, "#9fa7b3", 10, anchor))
    for number, (line, base) in enumerate(zip(lines, bases, strict=True)):
        parts.append(_area(place, line.points, base, COLOURS[number % len(COLOURS)], 0.3 if stacked else 0.06))
    return [*parts, *_legend(lines, left + 10, top + height - 10)]


def _legend(lines: list[Line], left: float, bottom: float) -> list[str]:
    parts: list[str] = []
    x, room = left, MAX_LEGEND_CHARACTERS
    for number, line in enumerate(lines):
        room -= len(line.name) + 3
        if room < 0:
            return [*parts, _text(x, bottom, "…", "#9fa7b3", 10)]
        parts.append(
            f'<rect x="{x:.0f}" y="{bottom - 6:.0f}" width="11" height="3" fill="{COLOURS[number % len(COLOURS)]}"/>'
        )
        parts.append(_text(x + 15, bottom, line.name, "#9fa7b3", 10))
        x += 28 + 6 * len(line.name)
    return parts


@dataclass(frozen=True)
class _Place:
    """Where a chart lies, and how times and values become pixels."""

    left: float
    top: float
    width: float
    height: float
    prometheus: Prometheus
    highest: float

    def x(self, when: float) -> float:
        span = self.prometheus.end - self.prometheus.start
        return self.left + (when - self.prometheus.start) / span * self.width

    def y(self, value: float) -> float:
        return self.top + self.height * (1 - min(1.0, value / self.highest))


def _area(place: _Place, points: list[tuple[float, float]], base: list[float], colour: str, opacity: float) -> str:
    """A line, and the area between it and its base."""
    upper = [f"{place.x(when):.1f},{place.y(value + low):.1f}" for (when, value), low in zip(points, base, strict=True)]
    lower = [f"{place.x(when):.1f},{place.y(low):.1f}" for (when, _), low in zip(points, base, strict=True)]
    return (
        f'<polygon points="{" ".join([*upper, *reversed(lower)])}" fill="{colour}" fill-opacity="{opacity}"/>'
        f'<polyline points="{" ".join(upper)}" fill="none" stroke="{colour}" stroke-width="1.3"/>'
    )


def _ticks(highest: float, kilo: float) -> list[float]:
    """Values from 0 to at least `highest`, four steps or so, round where prefixes of units are powers of `kilo`."""
    prefix = kilo ** math.floor(math.log(highest or 1.0, kilo))
    return [prefix * tick for tick in _round_ticks((highest or 1.0) / prefix)]


def _round_ticks(highest: float) -> list[float]:
    rough = highest / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(each * power for each in (1.0, 2.0, 2.5, 5.0, 10.0) if each * power >= rough * 0.999)
    return [number * step for number in range(math.ceil(highest / step - 1e-9) + 1)]


def _value(value: float, unit: str) -> str:
    if unit == "s":
        return f"{value:.3g} s" if value >= 1 or value == 0 else f"{1000 * value:.3g} ms"
    if unit == "bytes":
        power = min(3, int(math.log(value, 1024))) if value >= 1 else 0
        return f"{value / 1024**power:.3g} {('B', 'KiB', 'MiB', 'GiB')[power]}"
    if unit == "percentunit":
        return f"{100 * value:.3g} %"
    suffix = " /s" if unit == "reqps" else ""
    return (f"{value:,.0f}" if value >= 100 else f"{value:.3g}") + suffix


def _text(x: float, y: float, text: str, colour: str, size: int = 11, anchor: str = "start") -> str:
    place = f'x="{x:.0f}" y="{y:.0f}" fill="{colour}" font-size="{size}" text-anchor="{anchor}"'
    return f"<text {place}>{escape(text)}</text>"


def main() -> None:
    """Draw the last minutes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prometheus", default="http://127.0.0.1:9090", help="URL of Prometheus")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--what", default="", help="what ran, for the caption")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    end = time.time()
    caption = "The queries of deploy/grafana/mxgpt.json, answered by Prometheus and drawn by deploy/draw_dashboard.py"
    caption += f" (not a screenshot of Grafana). {arguments.what}".rstrip()
    prometheus = Prometheus(arguments.prometheus, end - 60 * arguments.minutes, end)
    arguments.out.write_text(draw(json.loads(DASHBOARD.read_text()), prometheus, caption))


if __name__ == "__main__":
    main()
