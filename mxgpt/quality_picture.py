"""A table with a bar in each cell, as SVG: what `mxgpt.quality_report` draws. No plotting library is needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

CHARACTER_WIDTH = 8  # of a name, at most
COLUMN_WIDTH = 165
BAR_WIDTH = 70  # of the longest bar in a column
ROW_HEIGHT = 24
HEAD_HEIGHT = 58  # a panel's title and its columns' titles
MARGIN = 16
STYLE = """text { font: 13px sans-serif; fill: #1c2430 }
.title { font-weight: bold; font-size: 15px }
.head { fill: #5b6675; font-size: 12px }
.bar { fill: #4a7fb5 }
.bar.below { fill: #5aa469 }
.line { stroke: #d8dde3 }"""


@dataclass(frozen=True)
class Column:
    """A quantity of every row: its value sets the bar's length, its label stands beside the bar."""

    title: str
    values: Sequence[float]
    labels: Sequence[str]


@dataclass(frozen=True)
class Panel:
    """One model: a row for each of its files."""

    title: str
    rows: Sequence[str]
    columns: Sequence[Column]


def draw(panels: Sequence[Panel]) -> str:
    """The panels below one another, as an SVG document.

    Columns of one title share one scale. A value below zero gets a bar of another colour.
    """
    longest = {
        title: max(abs(value) for panel in panels for c in panel.columns if c.title == title for value in c.values)
        for title in {column.title for panel in panels for column in panel.columns}
    }
    name_width = CHARACTER_WIDTH * max(len(name) for panel in panels for name in panel.rows) + MARGIN
    width = 2 * MARGIN + name_width + max(len(panel.columns) for panel in panels) * COLUMN_WIDTH
    parts = []
    top = MARGIN
    for panel in panels:
        parts += _panel(panel, top, width, MARGIN + name_width, longest)
        top += HEAD_HEIGHT + len(panel.rows) * ROW_HEIGHT + MARGIN
    open_tag = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{top}" viewBox="0 0 {width} {top}">'
    background = f'<rect width="{width}" height="{top}" fill="white"/>'
    return "\n".join([open_tag, f"<style>{STYLE}</style>", background, *parts, "</svg>"]) + "\n"


def _panel(panel: Panel, top: int, width: int, left: int, longest: Mapping[str, float]) -> list[str]:
    """A panel whose columns begin at `left`; `longest` has the value of the longest bar for each title."""
    parts = [_text(MARGIN, top + 18, panel.title, "title")]
    first_row = top + HEAD_HEIGHT
    for row, name in enumerate(panel.rows):
        y = first_row + row * ROW_HEIGHT
        parts.append(f'<line class="line" x1="{MARGIN}" y1="{y - 17}" x2="{width - MARGIN}" y2="{y - 17}"/>')
        parts.append(_text(MARGIN, y, name))
    for index, column in enumerate(panel.columns):
        x = left + index * COLUMN_WIDTH
        parts.append(_text(x, top + 36, column.title, "head"))
        for row, (value, label) in enumerate(zip(column.values, column.labels, strict=True)):
            y = first_row + row * ROW_HEIGHT
            length = BAR_WIDTH * abs(value) / (longest[column.title] or 1.0)
            sign = " below" if value < 0 else ""
            parts.append(f'<rect class="bar{sign}" x="{x}" y="{y - 11}" width="{length:.1f}" height="13"/>')
            parts.append(_text(x + length + 6, y, label))
    return parts


def _text(x: float, y: float, text: str, kind: str = "") -> str:
    of_kind = f' class="{kind}"' if kind else ""
    return f'<text{of_kind} x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'
