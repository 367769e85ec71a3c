"""The results of ``rotormlx quality`` as a table, as Markdown, and as one HTML page.

The page is self-contained: its plots are inline SVG, so it opens without a network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from rich.table import Table

from rotormlx.measure.free_running import Settings
from rotormlx.measure.intervals import Interval
from rotormlx.measure.quality_run import Result, Row
from rotormlx.measure.schemes import EXACT
from rotormlx.report import megabytes

# The columns of the tables, and how to make their cells.
COLUMNS: dict[str, Callable[[Row], str]] = {
    "bits per value": lambda row: f"{row.bits_per_value:.3f}",
    "exact tokens": lambda row: f"{row.sink} + {row.window}",
    "KL": lambda row: f"{row.kl:.4f}",
    "KL, 95 %": lambda row: _range(row.kl_interval, ".4f"),
    "KL minus the first's, 95 %": lambda row: _signed(row.kl_difference),
    "median": lambda row: f"{row.kl_median:.5f}",
    "median, 95 %": lambda row: _range(row.kl_median_interval, ".5f"),
    "99 %": lambda row: f"{row.kl_p99:.3f}",
    "99 %, 95 %": lambda row: _range(row.kl_p99_interval, ".3f", row.kl_max),
    "99.9 %": lambda row: f"{row.kl_p999:.3f}",
    "99.9 %, 95 %": lambda row: _range(row.kl_p999_interval, ".3f", row.kl_max),
    "top-1": lambda row: f"{row.top1:.1%}",
    "top-1, 95 %": lambda row: _range(row.top1_interval, ".1%"),
    "PPL": lambda row: f"{row.ppl:.2f}",
    "greedy": lambda row: f"{row.greedy_tokens:.0f}",
    "sampled": lambda row: "" if row.sampled_median is None else f"{row.sampled_median:g}",
    "sampled, 95 %": lambda row: _range(row.sampled_interval, "g"),
    "never differ": lambda row: "" if row.sampled_never is None else f"{row.sampled_never:.0%}",
    "never, 95 %": lambda row: _range(row.sampled_never_interval, ".0%"),
    "cosine": lambda row: f"{row.cosine:.4f}",
    "attention top-1": lambda row: f"{row.attention_top1:.1%}",
    "top-5": lambda row: f"{row.attention_top5:.1%}",
    "bytes": lambda row: megabytes(row.cache_bytes),
}
EXACT_TOKENS = (
    "Exact tokens: the number of first + latest tokens that a scheme never packs, its sink and its "
    "window. Compare schemes with equal numbers. Tokens that do not fill a block yet also stay "
    "exact: 63 at most, 127 with kvarn's group=128."
)
# Explanations: each one is shown together with any of its columns.
_LEGEND = {
    ("KL",): "KL: mean KL divergence of the next-token distribution from the exact cache's, in "
    "nats.",
    ("median", "99 %", "99.9 %"): "median, 99 %, 99.9 %: quantiles of the KL divergence.",
    ("KL, 95 %", "median, 95 %", "99 %, 95 %", "99.9 %, 95 %", "top-1, 95 %"): "95 %: a bootstrap "
    "interval over runs of 16 predictions. An interval that ends in 'or more' needs a longer text, "
    "because too few predictions are above it.",
    ("KL minus the first's, 95 %",): "KL minus the first's, 95 %: the bootstrap interval of the "
    "mean difference from the first scheme, prediction by prediction.",
    ("top-1",): "top-1: how often both caches agree on the most likely token.",
    ("greedy",): "greedy: the number of greedy tokens after the text before the first that differs "
    "from the exact cache's.",
    ("sampled",): "sampled: the median of this number for sampled continuations, drawn with the "
    "same random numbers in every scheme.",
    ("never differ",): "never differ: the share of sampled continuations that are equal to the "
    "exact cache's.",
    ("sampled, 95 %",): "sampled, 95 %: an interval from ranks.",
    ("never, 95 %",): "never, 95 %: Wilson's interval.",
    ("PPL",): "PPL: perplexity.",
    ("cosine",): "cosine: the cosine of attention outputs with the exact ones, measured for each "
    "layer alone; the mean over layers.",
    ("attention top-1", "top-5"): "attention top-1, top-5: the share of queries whose most "
    "attended token stays the most attended, or among the five most attended.",
    (
        "bits per value",
    ): "bits per value: bits of a compressed value, including scales and centres.",
    ("bytes",): "bytes: size of the cache after the last text.",
}
TASK_LEGEND = (
    "Share of questions whose every token is right, with Wilson's interval at 95 %. The answers "
    "are in texts of 1,024 tokens, in packed bytes. fact: a number that the text gives for a name. "
    "copy: the continuation of a run of random tokens. chain: two sums, one after the other, after "
    "examples. Against exact: questions lost and gained against the exact cache, with the p of "
    "McNemar's exact test, two-sided and not corrected for the number of comparisons."
)
# Columns for a terminal, which shows as many as fit.
_PRINTED = (
    *("bits per value", "exact tokens", "KL", "KL, 95 %", "median", "99.9 %", "top-1"),
    *("top-1, 95 %", "sampled", "greedy", "PPL", "never differ", "99.9 %, 95 %"),
)


def table(result: Result, width: int) -> Table:
    """Return the main columns, as many as fit a terminal of ``width`` characters."""
    columns = {"scheme": [row.scheme for row in result.rows]}
    cells_of = _columns(result)
    columns |= {
        name: [cells_of[name](row) for row in result.rows] for name in _PRINTED if name in cells_of
    }
    out = Table(title=f"{heading(result)}\n{EXACT_TOKENS}")
    shown: list[list[str]] = []
    room = width - 1
    for name, cells in columns.items():
        needed = max(map(len, (*cells, *name.split())))
        room -= needed + 3  # the borders between columns
        if shown and room < 0:
            out.caption = "A wider terminal shows more columns; the files have all columns."
            break
        out.add_column(name, justify="left" if name == "scheme" else "right", width=needed)
        shown.append(cells)
    for row in zip(*shown, strict=True):
        out.add_row(*row)
    return out


def legend(columns: Iterable[str]) -> list[str]:
    """Return the explanations of some columns of ``COLUMNS``."""
    shown = set(columns)
    return [text for names, text in _LEGEND.items() if shown.intersection(names)]


def _columns(result: Result) -> dict[str, Callable[[Row], str]]:
    """Return the columns to show; those of continuations only where there are any."""
    absent = set() if result.written.greedy else {"greedy"}
    if not (result.written.sampled and result.written.seeds):
        absent |= {"sampled", "sampled, 95 %", "never differ", "never, 95 %"}
    return {name: cell for name, cell in COLUMNS.items() if name not in absent}


def task_table(result: Result) -> Table:
    """Return the results of the generated tasks as a table for a terminal."""
    header, rows = task_cells(result)
    out = Table(title="Generated tasks: questions solved")
    for name in header:
        out.add_column(name)
    for row in rows:
        out.add_row(*row)
    return out


def task_cells(result: Result) -> tuple[list[str], list[list[str]]]:
    """Return header and rows: the exact cache, then the schemes; two columns per kind of task."""
    header = ["scheme"]
    for score in result.exact_tasks:
        header += [f"{score.kind}, of {score.trials}", f"{score.kind}, against exact"]
    rows = [[EXACT, *(cell for score in result.exact_tasks for cell in (str(score), ""))]]
    rows += [
        [row.scheme, *(cell for score in row.tasks for cell in (str(score), score.against_exact))]
        for row in result.rows
        if row.tasks
    ]
    return header, rows


def heading(result: Result) -> str:
    """Return one line about the model and the exact cache."""
    return (
        f"{result.model}: {result.predictions} predictions, exact cache: perplexity "
        f"{result.exact_ppl:.2f}, {megabytes(result.exact_bytes)}"
    )


def setting(result: Result) -> str:
    """Return one line about the command, the texts, the machine and the date."""
    texts = ", ".join(result.texts)
    packages = ", ".join(f"{name} {number}" for name, number in result.versions.items())
    return (
        f"`{result.command}`, {result.tokens} tokens of {texts} read in chunks of 64, predictions "
        f"compared from {result.start} on, computed in {result.dtype}; {_written(result.written)}; "
        f"{result.machine}; {packages}; {result.date}."
    )


def _written(written: Settings) -> str:
    """Return a phrase about the continuations of each text."""
    sampled = written.seeds if written.sampled else 0
    return (
        f"{written.greedy} greedy tokens and {sampled} continuations of {written.sampled} tokens "
        f"sampled at temperature {written.temperature:g} after each text"
    )


def markdown(result: Result) -> str:
    """Return the table of all columns as Markdown, with its setting and legend."""
    columns = _columns(result)
    lines = [["scheme", *columns], ["---"] * (1 + len(columns))]
    for row in result.rows:
        lines.append([f"`{row.scheme}`", *(cell(row) for cell in columns.values())])
    explained = "\n".join(f"- {text}" for text in legend(columns))
    parts = [f"{heading(result)}.", EXACT_TOKENS, _piped(lines), setting(result), explained]
    if result.exact_tasks:
        header, rows = task_cells(result)
        named = [[f"`{name}`", *cells] for name, *cells in rows]
        parts += [_piped([header, ["---"] * len(header), *named]), TASK_LEGEND]
    return "\n\n".join(parts) + "\n"


def _piped(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def html(result: Result, plots: Mapping[str, str]) -> str:
    """Return an HTML page that needs no other file and no network.

    Args:
        result: The results.
        plots: ``<svg>`` elements by title, see :func:`rotormlx.measure.plots.of_quality`.
    """
    loader = PackageLoader("rotormlx", "pages")
    template = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True
    ).get_template("quality.html")
    columns = _columns(result)
    rows = [(row.scheme, [cell(row) for cell in columns.values()]) for row in result.rows]
    return template.render(
        heading=heading(result),
        setting=setting(result).replace("`", ""),
        exact_tokens=EXACT_TOKENS,
        legend=legend(columns),
        columns=list(columns),
        rows=rows,
        tasks=task_cells(result) if result.exact_tasks else None,
        task_legend=TASK_LEGEND,
        plots=plots,
    )


def _range(interval: Interval | None, form: str, largest: float = np.inf) -> str:
    """Format an interval; one that ends at the largest measured value has no upper bound."""
    if interval is None:
        return ""
    low, high = interval
    end = "or more" if high >= largest else f"to {high:{form}}"
    return f"{low:{form}} {end}"


def _signed(interval: tuple[float, float]) -> str:
    return "" if interval == (0, 0) else "{:+.4f} to {:+.4f}".format(*interval)
