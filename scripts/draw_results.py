"""Draw the figures of docs/results/ from the tables of its pages.

    python scripts/draw_results.py [--output FOLDER]

Each figure is drawn from the Markdown tables of the page that shows it, and stores the numbers that
it shows in its metadata. ``tests/system/test_draw_results.py`` compares these numbers with the
tables. ``pip install -e ".[bench]"`` installs matplotlib.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import matplotlib as mpl
import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rotormlx.measure.plots import log_axis

PAGES = Path(__file__).parent.parent / "docs" / "results"
STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#666666",
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.facecolor": "white",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "savefig.facecolor": "white",
    "svg.fonttype": "path",
    "svg.hashsalt": "rotormlx",
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
}
# The palette of Okabe and Ito, distinguishable with any colour vision.
BLACK, BLUE, SKY, GREEN = "#000000", "#0072b2", "#56b4e9", "#009e73"
ORANGE, RED, PINK, GREY = "#e69f00", "#d55e00", "#cc79a7", "#777777"

Data = dict[str, Any]


# ---- tables --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """A Markdown table: its header, and its rows without bold and code marks."""

    header: list[str]
    rows: list[list[str]]

    def column(self, name: str) -> list[str]:
        """Return the cells of a column."""
        place = self.header.index(name)
        return [row[place] for row in self.rows]

    def numbers(self, name: str) -> list[float]:
        """Return the first number of each cell of a column."""
        return [number(cell) for cell in self.column(name)]

    def row(self, name: str) -> list[str]:
        """Return the cells of a row without the first, which holds its name."""
        return next(row[1:] for row in self.rows if row[0] == name)


def number(cell: str) -> float:
    """Return the first number of a cell, such as 0.0012 of ``0.0012 (0.0010 to 0.0014)``."""
    found = re.search(r"-?\d[\d,]*(?:\.\d+)?", cell)
    if found is None:
        raise ValueError(f"A cell must hold a number to be drawn, but got {cell!r}.")
    return float(found[0].replace(",", ""))


def interval(cell: str) -> list[float]:
    """Return the share and its interval, in percent, of a cell such as ``68.8% (62% to 75%)``."""
    return [float(part) for part in re.findall(r"[\d.]+(?=%)", cell)]


def divergences(table: Table) -> Iterable[tuple[str, float, float]]:
    """Return the scheme, bits per value and KL of each row."""
    bits, divergence = table.numbers("bits per value"), table.numbers("KL")
    return zip(table.column("scheme"), bits, divergence, strict=True)


def pairs(first: Iterable[float], second: Iterable[float]) -> list[list[float]]:
    """Return the points of a series."""
    return [list(pair) for pair in zip(first, second, strict=True)]


def tables(page: str, heading: str) -> list[Table]:
    """Return the tables of a page between a heading and the next one."""
    text = (PAGES / page).read_text(encoding="utf-8")
    found = re.search(
        rf"^#+ {re.escape(heading)}\n(.*?)(?=^#+ |\Z)", text, re.DOTALL | re.MULTILINE
    )
    if found is None:
        raise ValueError(f"{page} must have the heading {heading!r}, but it does not.")
    blocks = re.findall(r"(?:^\|.*\n)+", found[1], re.MULTILINE)
    return [_table(block) for block in blocks]


def _table(block: str) -> Table:
    lines = [
        [cell.strip().replace("**", "").replace("`", "") for cell in line.strip()[1:-1].split("|")]
        for line in block.splitlines()
    ]
    return Table(lines[0], lines[2:])


# ---- parts of figures ----------------------------------------------------------------------------


def panels(count: int, width: float, height: float, **shared: Any) -> tuple[Figure, list[Axes]]:
    """Return a figure and its axes in one row; sizes in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.get_layout_engine().set(wspace=0.05)
    axes = figure.subplots(1, count, squeeze=False, **shared)[0]
    return figure, list(axes)


def divergence_axis(ax: Axes) -> None:
    """Set up a logarithmic axis of KL divergence."""
    ax.set_yscale("log")
    log_axis(ax.yaxis)
    ax.set_ylabel("KL divergence, nats (log scale)")


def label(
    ax: Axes, point: list[float], text: str, color: str, *, left: bool = False, dy: float = 0
) -> None:
    """Write a name beside a point; ``dy``, in points, keeps names apart."""
    ax.annotate(
        text,
        (point[0], point[1]),
        xytext=(-6 if left else 6, dy),
        textcoords="offset points",
        color=color,
        ha="right" if left else "left",
        va="center",
        annotation_clip=False,
    )


# ---- figures -------------------------------------------------------------------------------------

FAMILIES = {
    "rotormlx": (BLACK, "o"),
    "KVarN": (BLUE, "s"),
    "KIVI": (GREEN, "D"),
    "exllamav3": (ORANGE, "^"),
    "TurboQuant": (RED, "v"),
    "TurboQuant, QJL": (PINK, "v"),
    "RotorQuant": (SKY, "P"),
    "NVFP4": (GREY, "X"),
}
PREFIXES = {
    "kvarn": "KVarN",
    "kivi": "KIVI",
    "exl3": "exllamav3",
    "turboquant": "TurboQuant",
    "rotorquant": "RotorQuant",
    "nvfp4": "NVFP4",
}


def family(scheme: str) -> str:
    """Return the family of a scheme of the tables in ``rivals.md``."""
    prefix, _, rest = scheme.partition("-")
    name = PREFIXES[prefix] if rest else "rotormlx"
    return f"{name}, QJL" if "qjl" in rest else name


def rivals_data(heading: str) -> Data:
    """Return bits per value and KL of each scheme, by family."""
    (table,) = tables("rivals.md", heading)
    data: Data = {name: [] for name in FAMILIES}
    for scheme, bits, divergence in divergences(table):
        data[family(scheme)].append([bits, divergence])
    return data


def lowest(points: list[list[float]]) -> list[list[float]]:
    """Return, by bits, the points that no other point beats in both bits and divergence."""
    kept: list[list[float]] = []
    for point in sorted(points):
        if not kept or point[1] < kept[-1][1]:
            kept.append(point)
    return kept


def draw_rivals(data: Data) -> Figure:
    """Draw KL over bits, with a line through the best points of each family."""
    figure, (ax,) = panels(1, 7.2, 4.6)
    for name, (color, marker) in FAMILIES.items():
        best, points = lowest(data[name]), data[name]
        front = 4 if name == "rotormlx" else 2
        width = 2.4 if name == "rotormlx" else 1.4
        ax.scatter(*zip(*points, strict=True), color=color, marker=marker, s=22, zorder=front)
        ax.plot(
            *zip(*best, strict=True),
            color=color,
            marker=marker,
            linewidth=width,
            zorder=front,
            label=name,
        )
    divergence_axis(ax)
    ax.set_xlabel("true bits per value")
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


LONG_TEXT = {"KL": "mean", "median": "median", "99 %": "99 %", "99.9 %": "99.9 %"}


def long_text_data() -> Data:
    """Return the mean and quantiles of the divergence at each bit width."""
    table = tables("quality.md", "A long text")[0]
    bits = table.numbers("bits per value")
    return {shown: pairs(bits, table.numbers(column)) for column, shown in LONG_TEXT.items()}


def draw_long_text(data: Data) -> Figure:
    """Draw the mean and quantiles over bits."""
    figure, (ax,) = panels(1, 5.6, 3.6)
    colors = {"mean": BLACK, "median": BLUE, "99 %": ORANGE, "99.9 %": RED}
    for name, points in data.items():
        ax.plot(*zip(*points, strict=True), color=colors[name], marker="o")
        label(ax, points[0], name, colors[name])
    divergence_axis(ax)
    ax.set_xticks(sorted(bits for bits, _ in data["mean"]))
    ax.set_xlabel("bits per value")
    return figure


def bits_data() -> Data:
    """Return bits per value and KL of each pair of widths, by the part with more bits."""
    table = tables("bits.md", "Keys and values")[0]
    data: Data = {"more bits in keys": {}, "equal bits": {}, "more bits in values": {}}
    for scheme, bits, divergence in divergences(table):
        keys, values = (int(part) for part in re.findall(r"\d", scheme))
        part = "more bits in keys" if keys > values else "more bits in values"
        if divergence > 0:  # a logarithmic axis cannot show 0.00000
            data["equal bits" if keys == values else part][scheme] = [bits, divergence]
    return data


def draw_bits(data: Data) -> Figure:
    """Draw KL over bits; each point is labelled with its scheme."""
    figure, (ax,) = panels(1, 6.4, 4.2)
    colors = {"more bits in keys": BLUE, "equal bits": BLACK, "more bits in values": RED}
    markers = {"more bits in keys": "^", "equal bits": "o", "more bits in values": "v"}
    for name, points in data.items():
        ax.scatter(
            *zip(*points.values(), strict=True),
            color=colors[name],
            marker=markers[name],
            label=name,
        )
        for scheme, point in points.items():
            label(ax, point, scheme, colors[name], left=name == "more bits in keys")
    divergence_axis(ax)
    ax.set(xlabel="bits per value", xlim=(2.2, 6.8))
    ax.legend(loc="lower left")
    return figure


def exact_tokens_data() -> Data:
    """Return the KL of 4 and 3 bits over the sink, and over the window."""
    data: Data = {}
    for name, table in zip(
        ("sink", "window"), tables("exact_tokens.md", "How many exact tokens"), strict=True
    ):
        # "0, 16, 32" is one column, since these windows keep the same tokens exact.
        lengths = [number(cell.split(",")[0]) for cell in table.header[1:]]
        data[name] = {
            scheme: pairs(lengths, map(number, table.row(scheme))) for scheme in ("k4v4", "k3v3")
        }
    return data


def draw_exact_tokens(data: Data) -> Figure:
    """Draw two panels, sink and window, that share the divergence axis."""
    figure, axes = panels(2, 7.2, 3.4, sharey=True)
    shown = {"sink": "sink tokens (window 64)", "window": "window, tokens (sink 4)"}
    for ax, (name, series) in zip(axes, data.items(), strict=True):
        for (scheme, points), color in zip(series.items(), (BLACK, BLUE), strict=True):
            x, y = zip(*points, strict=True)
            ax.plot(x, y, color=color, marker="o")
            label(ax, points[-1], scheme, color)
        divergence_axis(ax)
        ax.label_outer()
        ax.set_xticks(x)
        ax.set_xlabel(shown[name])
    return figure


NEEDLES = {
    "Fact needles": ("fact, all", "facts"),
    "Copy needles": ("copy, all", "copies"),
    "Chains of sums": ("chain, 512 tokens", "chains of sums"),
}


def needles_data() -> Data:
    """Return the share found and its interval, in percent, by kind of needle and scheme."""
    data: Data = {}
    for heading, (row, shown) in NEEDLES.items():
        (table,) = tables("needles.md", heading)
        cells = zip(table.header[1:], map(interval, table.row(row)), strict=True)
        data[shown] = dict(cells)
    return data


def draw_needles(data: Data) -> Figure:
    """Draw one panel per kind, with a point and its interval per scheme."""
    figure, axes = panels(len(data), 7.2, 2.7, sharey=True)
    schemes = ["exact", "k4v4", "k3v3", "k2v2", "kivi-k4v4", "affine-k4v4"]
    for ax, (name, found) in zip(axes, data.items(), strict=True):
        for scheme, (share, low, high) in found.items():
            place = schemes.index(scheme)
            color = GREY if scheme == "exact" else RED if "-" in scheme else BLACK
            ax.plot([low, high], [place, place], color=color, linewidth=1.4)
            ax.plot([share], [place], color=color, marker="o")
        ax.axvline(found["exact"][0], color=GREY, linewidth=0.8, linestyle=":")
        ax.set(title=name, xlim=(0, 100), xlabel="found, %")
    axes[0].set_yticks(range(len(schemes)), schemes)
    axes[0].invert_yaxis()
    return figure


CPU_SERIES = {
    "MLX float32": (ORANGE, "-"),
    "mlx-lm 4 bit": (RED, "-"),
    "torch float32": (SKY, "-"),
    "torch bfloat16": (BLUE, "-"),
    "folded torch bfloat16": (BLUE, "--"),
    "rotormlx 4 bit": (BLACK, "-"),
}


def cpu_data() -> Data:
    """Return the milliseconds of a decode step over the length of the history."""
    table = tables("speed_cpu.md", "Decode attention")[0]
    tokens = [number(cell) for cell in table.header[1:]]
    return {name: pairs(tokens, map(number, table.row(name))) for name in CPU_SERIES}


def draw_cpu(data: Data) -> Figure:
    """Draw time over history."""
    figure, (ax,) = panels(1, 7.2, 4.2)
    for name, points in data.items():
        color, line = CPU_SERIES[name]
        x, y = zip(*points, strict=True)
        ax.plot(x, y, color=color, linestyle=line, marker="o", markersize=3.5)
        apart = {"MLX float32": 5, "mlx-lm 4 bit": -5}
        label(ax, points[-1], name, color, dy=apart.get(name, 0))
    _time_axes(ax, list(x))
    ax.set_ylabel("ms per layer (log scale)")
    return figure


def gpu_data() -> Data:
    """Return the milliseconds of a decode step over the history, by batch, for GQA 4."""
    table = tables("speed_gpu.md", "Decode attention")[0]
    data: Data = {}
    for row in table.rows:
        gqa, batch, tokens = row[:3]
        if gqa == "4":
            times = {"flash, bfloat16": row[3], "rotormlx 4 bit": row[5], "rotormlx 3 bit": row[9]}
            for name, ms in times.items():
                series = data.setdefault(f"batch {batch}", {}).setdefault(name, [])
                series.append([number(tokens), number(ms)])
    return data


def draw_gpu(data: Data) -> Figure:
    """Draw time over history, one panel per batch."""
    figure, axes = panels(len(data), 7.2, 3.4, sharey=True)
    colors = {"flash, bfloat16": RED, "rotormlx 4 bit": BLACK, "rotormlx 3 bit": BLUE}
    for ax, (batch, series) in zip(axes, data.items(), strict=True):
        for name, points in series.items():
            x, y = zip(*points, strict=True)
            ax.plot(x, y, color=colors[name], marker="o", label=name)
        _time_axes(ax, list(x))
        ax.set_title(batch)
    axes[0].set_ylabel("ms (log scale)")
    axes[0].legend(loc="upper left")
    return figure


def _time_axes(ax: Axes, tokens: list[float]) -> None:
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    log_axis(ax.xaxis, tokens)
    log_axis(ax.yaxis)
    ax.set_xlabel("tokens of history (log scale)")


@dataclass(frozen=True)
class Picture:
    """A figure: a function that reads its numbers from tables, and one that draws them."""

    read: Callable[[], Data]
    draw: Callable[[Data], Figure]


PICTURES = {
    "rivals_smollm2.svg": Picture(lambda: rivals_data("SmolLM2-135M-Instruct"), draw_rivals),
    "rivals_gemma.svg": Picture(lambda: rivals_data("Gemma 3 270M"), draw_rivals),
    "quality_long_text.svg": Picture(long_text_data, draw_long_text),
    "bits_keys_values.svg": Picture(bits_data, draw_bits),
    "exact_tokens.svg": Picture(exact_tokens_data, draw_exact_tokens),
    "needles.svg": Picture(needles_data, draw_needles),
    "speed_cpu.svg": Picture(cpu_data, draw_cpu),
    "speed_gpu.svg": Picture(gpu_data, draw_gpu),
}


def write(picture: Picture, path: Path) -> None:
    """Draw a figure, and store the numbers that it shows as its description."""
    data = picture.read()
    metadata = {"Creator": None, "Date": None, "Description": json.dumps(data)}
    with mpl.rc_context(STYLE):
        picture.draw(data).savefig(path, metadata=metadata)


def shown(path: Path) -> Data:
    """Return the numbers that a figure shows."""
    text = path.read_text(encoding="utf-8")
    found = re.search(r"<dc:description>(.*?)</dc:description>", text, re.DOTALL)
    if found is None:
        raise ValueError(
            f"{path} must hold the numbers that it shows, but it does not; draw it again."
        )
    return json.loads(html.unescape(found[1]))


def main(
    output: Annotated[Path, typer.Option(help="Folder for the figures.")] = PAGES,
) -> None:
    """Draw every figure."""
    for name, picture in PICTURES.items():
        write(picture, output / name)
        print(output / name)


if __name__ == "__main__":
    typer.run(main)
