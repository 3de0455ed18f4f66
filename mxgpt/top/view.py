"""How a history looks in a terminal: totals above, a table for each kind of service below; 80 columns suffice."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.panel import Panel
from rich.segment import Segment
from rich.style import Style
from rich.table import Table
from rich.text import Text

from mxgpt.cli.terminal import printable
from mxgpt.top.history import History, Watched

FIRST_TOKEN = "gen_ai_server_time_to_first_token_seconds"
PER_TOKEN = "gen_ai_server_time_per_output_token_seconds"
_EIGHTHS = " ▁▂▃▄▅▆▇█"
_FAINT = "grey50"
_CYAN = ("#0e7490", "#06b6d4", "#67e8f9")  # of a chart's lines, from the lowest up
_GREEN = ("#15803d", "#22c55e", "#86efac")
_NUM_FIXED_LINES = 7  # header, two borders, three lines of facts, outcomes
_MAX_CHART_LINES = 8
_NAME_WIDTH = 17


class Chart:
    """The last values, a column each, `height` lines high and as wide as there is room; the newest is at the right."""

    def __init__(self, values: Iterable[float], height: int = 1, colours: Sequence[str] = _CYAN) -> None:
        self._values = list(values)
        self._height = height
        self._colours = colours

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        shown = self._values[-options.max_width :]
        highest = max(shown, default=0.0) or 1.0
        # A value that is not 0 shows as something.
        eighths = [max(1, round(value / highest * 8 * self._height)) if value > 0 else 0 for value in shown]
        for line in reversed(range(self._height)):
            marks = "".join(_EIGHTHS[min(8, max(0, eighth - 8 * line))] for eighth in eighths)
            colour = self._colours[(2 * line + 1) * len(self._colours) // (2 * self._height)]
            yield Segment(marks.rjust(options.max_width), Style.parse(colour))
            yield Segment.line()

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(1, options.max_width)


def render(history: History, width: int, height: int, clock: float | None = None) -> RenderableType:
    """The whole view, `width` columns wide; charts take what `height` leaves them.

    Args:
        clock: seconds since 1970, for tests.
    """
    executors, tokenizers, loaders = (history.of(kind) for kind in ("executor", "tokenizer", "loader"))
    tables: list[RenderableType] = []
    if executors:
        tables.append(_executors(history, executors, width))
    if tokenizers:
        tables.append(_tokenizers(history, tokenizers, width))
    if loaders:
        tables.append(_loaders(loaders, width))
    for each in history.watched:
        if not each.scrapes:
            why = printable(f" no metrics from {each.address}: {each.error}")
            tables.append(Text(why, "red", no_wrap=True, overflow="ellipsis"))
    num_lines = sum(table.row_count + 1 if isinstance(table, Table) else 1 for table in tables)
    left = height - num_lines - _NUM_FIXED_LINES
    is_roomy = left >= len(tables) + 1
    chart_height = max(1, min(_MAX_CHART_LINES, left - len(tables) if is_roomy else left))
    parts: list[RenderableType] = [_header(history, clock), _totals(history, executors, chart_height)]
    for table in tables:
        parts += ["", table] if is_roomy else [table]
    return Group(*parts)


def _header(history: History, clock: float | None) -> RenderableType:
    executors = [each for each in history.of("executor") if each.is_there]
    models = sorted({each.now.label("mxgpt_executor_model", "model") for each in executors} - {""})
    counts = ", ".join(_count(history, kind) for kind in ("executor", "tokenizer", "loader"))
    line = Table.grid(expand=True)
    line.add_column(no_wrap=True, ratio=1)
    line.add_column(justify="right", no_wrap=True)
    title = Text.assemble((" mxgpt ", "bold white on blue"), f" {printable(', '.join(models)) or 'no model yet'}")
    line.add_row(title, Text(f"{counts}  {time.strftime('%H:%M:%S', time.localtime(clock))} ", _FAINT))
    return line


def _count(history: History, kind: str) -> str:
    number = sum(each.is_there for each in history.of(kind))
    return f"{number} {kind}{'' if number == 1 else 's'}"


def _totals(history: History, executors: Sequence[Watched], chart_height: int) -> RenderableType:
    there = [each for each in executors if each.is_there]
    computed = sum(each.rate("mxgpt_executor_prompt_tokens_total", source="computed") for each in there)
    cached = sum(each.rate("mxgpt_executor_prompt_tokens_total", source="cached") for each in there)
    steps = sum(each.rate("mxgpt_executor_steps_total") for each in there)
    waiting = sum(each.now.total("mxgpt_executor_sequences", state="waiting") for each in there)
    preempted = sum(each.now.total("mxgpt_executor_preemptions_total") for each in there)
    rate, running = (values[-1] if values else 0.0 for values in (history.rates, history.running))
    first = [history.quantile(FIRST_TOKEN, share, there) for share in (0.5, 0.99)]
    between = [history.quantile(PER_TOKEN, share, there) for share in (0.5, 0.99)]
    written = _panel(
        _headline(
            (f"{rate:,.0f}", "bold #67e8f9"), " tokens/s written", f"  peak {max(history.rates, default=0):,.0f}"
        ),
        Chart(history.rates, chart_height),
        _facts(("prompts", f"{computed + cached:,.0f} tokens/s"), ("steps", f"{steps:,.0f}/s")),
        _facts(("prefix hits", _share(cached, cached + computed)), ("preempted", f"{preempted:,.0f}")),
    )
    streams = _panel(
        _headline((f"{running:,.0f}", "bold #86efac"), " sequences run", (f"  {waiting:,.0f}", "bold"), " wait"),
        Chart(history.running, chart_height, _GREEN),
        _facts(("first token p50", _seconds(first[0])), ("p99", _seconds(first[1]))),
        _facts(("per token   p50", _seconds(between[0])), ("p99", _seconds(between[1]))),
    )
    both = Table.grid(expand=True)
    both.add_column(ratio=1)
    both.add_column(ratio=1)
    both.add_row(written, streams)
    return Group(both, _outcomes(there))


def _panel(*lines: RenderableType) -> Panel:
    return Panel(Group(*lines), border_style=_FAINT, padding=(0, 1))


def _outcomes(executors: Sequence[Watched]) -> RenderableType:
    """What became of the calls that ended within the window."""
    ended: dict[str, float] = {}
    for each in executors:
        for reason, count in each.recent("mxgpt_executor_calls_total", "reason", method="Generate").items():
            ended[reason] = ended.get(reason, 0.0) + count
    line = Text(" requests ended lately: ", _FAINT, no_wrap=True, overflow="ellipsis")
    shown = [(reason, count) for reason, count in sorted(ended.items(), key=lambda item: -item[1]) if count > 0]
    for number, (reason, count) in enumerate(shown):
        style = "green" if reason == "OK" else "yellow" if reason == "CANCELLED" else "red"
        line.append("  " if number else "").append(f"{count:,.0f} {reason}", style)
    return line if shown else line.append("none")


def _executors(history: History, executors: Sequence[Watched], width: int) -> RenderableType:
    table = _table("EXECUTOR", width)
    for name in ("RUN", "WAIT", "TOK/S"):
        table.add_column(name, justify="right")
    table.add_column("", ratio=1, min_width=6)
    table.add_column("FIRST", justify="right")
    table.add_column("KV BLOCKS", min_width=20)
    table.add_column("KV", justify="right")
    for each in executors:
        now = each.now
        name = printable(now.label("mxgpt_info", "instance"))
        if not each.is_there:
            table.add_row(_cut(name), Text("gone", "red"))
            continue
        draining = now.total("mxgpt_executor_draining") > 0
        table.add_row(
            Text(_cut(name), "yellow" if draining else ""),
            f"{now.total('mxgpt_executor_sequences', state='running'):,.0f}",
            f"{now.total('mxgpt_executor_sequences', state='waiting'):,.0f}",
            Text(f"{each.rate('mxgpt_executor_output_tokens_total'):,.0f}", _CYAN[1]),
            Chart(each.rates),
            _seconds(history.quantile(FIRST_TOKEN, 0.5, [each])),
            _blocks(each),
            _bytes(now.total("mxgpt_executor_memory_bytes", kind="kv")),
        )
    return table


def _blocks(executor: Watched) -> RenderableType:
    """A bar for each group of layers: used, cached, free."""
    line = Text(no_wrap=True)
    groups = sorted(executor.now.by_label("mxgpt_executor_kv_blocks", "group"))
    width = (20 - 6 * len(groups)) // max(1, len(groups))
    for number, group in enumerate(groups):
        states = executor.now.by_label("mxgpt_executor_kv_blocks", "state", group=group)
        total = sum(states.values()) or 1.0
        used = states.get("used", 0.0) / total
        num_used = min(width, -(-round(used * width * 8) // 8))
        num_cached = min(width - num_used, round(states.get("cached", 0.0) / total * width))
        style = "red" if used > 0.9 else "yellow" if used > 0.7 else "green"
        line.append(" " if number else "").append("█" * num_used, style).append("▒" * num_cached, "blue")
        line.append("░" * (width - num_used - num_cached), _FAINT).append(f" {100 * used:3.0f}%", style)
    return line


def _tokenizers(history: History, tokenizers: Sequence[Watched], width: int) -> RenderableType:
    table = _table("TOKENIZER", width)
    for name in ("SEQ", "PIPES", "IDS/S"):
        table.add_column(name, justify="right")
    table.add_column("", ratio=1, min_width=6)
    table.add_column("CALLS/S", justify="right")
    table.add_column("CALL P99", justify="right")
    table.add_column("RESIDENT", justify="right")
    for each in tokenizers:
        name = _cut(printable(each.now.label("mxgpt_info", "instance")))
        if not each.is_there:
            table.add_row(name, Text("gone", "red"))
            continue
        table.add_row(
            name,
            f"{each.now.total('mxgpt_tokenizer_sequences'):,.0f}",
            f"{each.now.total('mxgpt_tokenizer_streams'):,.0f}",
            Text(f"{each.rate('mxgpt_tokenizer_decoded_tokens_total'):,.0f}", _CYAN[1]),
            Chart(each.rates),
            f"{each.rate('mxgpt_tokenizer_calls_total'):,.1f}",
            _seconds(history.quantile("mxgpt_tokenizer_call_duration_seconds", 0.99, [each])),
            _bytes(each.now.total("process_resident_memory_bytes")),
        )
    return table


def _loaders(loaders: Sequence[Watched], width: int) -> RenderableType:
    table = _table("LOADER", width)
    table.add_column("MODEL", ratio=1, no_wrap=True, overflow="ellipsis")
    table.add_column("LEASES", justify="right")
    table.add_column("WEIGHTS", justify="right")
    table.add_column("USED", justify="right")
    table.add_column("FREE", justify="right")
    table.add_column("DEVICE", justify="right")
    for each in loaders:
        name = _cut(printable(each.now.label("mxgpt_info", "instance")))
        if not each.is_there:
            table.add_row(name, Text("gone", "red"))
            continue
        device = each.now.label("mxgpt_loader_free_bytes", "device")
        used = _bytes(each.now.total("mxgpt_loader_used_bytes") or None)
        free = _bytes(each.now.total("mxgpt_loader_free_bytes"))
        resident = each.now.by_label("mxgpt_loader_resident_bytes", "model")
        loading = each.now.by_label("mxgpt_loader_load_total_bytes", "model")
        for model, num_bytes in resident.items():
            leases = each.now.total("mxgpt_loader_leases", model=model)
            table.add_row(name, Text(printable(model)), f"{leases:.0f}", _bytes(num_bytes), used, free, device)
            name = used = free = device = ""
        for model, total in loading.items():
            done = each.now.total("mxgpt_loader_load_done_bytes", model=model) / total if total else 0.0
            table.add_row(
                name, Text(printable(model)), Text(f"{done:.0%} loaded", "yellow"), _bytes(total), free, device
            )
            name = used = free = device = ""
        if not resident and not loading:
            table.add_row(name, Text("none", _FAINT), "", "", used, free, device)
    return table


def _table(title: str, width: int) -> Table:
    table = Table(box=None, expand=True, width=width, header_style=f"bold {_FAINT}", padding=(0, 1, 0, 0))
    table.title_justify = "left"
    table.add_column(f" {title}", no_wrap=True, width=_NAME_WIDTH)
    return table


def _headline(*parts: str | tuple[str, str]) -> Text:
    return Text.assemble(*parts, style=_FAINT, no_wrap=True, overflow="ellipsis")


def _facts(*facts: tuple[str, str]) -> Text:
    line = Text(no_wrap=True, overflow="ellipsis")
    for number, (name, value) in enumerate(facts):
        line.append("  " if number else "").append(f"{name} ", _FAINT).append(value, "bold")
    return line


def _cut(name: str) -> str:
    """A name short enough for its column, with its end, which tells replicas apart."""
    room = _NAME_WIDTH - 2
    return f" {name if len(name) <= room else f'…{name[1 - room :]}'}"


def _seconds(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.0f} ms" if value >= 0.0995 else f"{1000 * value:.1f} ms"


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.0%}" if whole else "–"


def _bytes(value: float | None) -> str:
    if value is None:
        return "–"
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"
