"""The plots of ``rotormlx quality`` and ``bench``; only this module needs matplotlib."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from rotormlx.measure import bench, quality_run
from rotormlx.measure.quality_run import Row


def of_quality(result: quality_run.Result) -> dict[str, str]:
    """Return ``<svg>`` elements by title: quality against bits, by position and by layer."""
    return {
        "Quality against bits": picture(lambda axes: _against_bits(axes, result.rows)),
        "KL divergence by position": picture(lambda axes: _by_position(axes, result)),
        "Error of the attention output by layer": picture(
            lambda axes: _by_layer(axes, result.rows, "1 - cosine", lambda e: 1 - e.cosine)
        ),
        "Error of the keys by layer": picture(
            lambda axes: _by_layer(axes, result.rows, "relative error", lambda e: e.key_error)
        ),
    }


def of_bench(result: bench.Result) -> str:
    """Return an ``<svg>`` element: decode speed against context."""

    def draw(axes: Axes) -> None:
        for name in dict.fromkeys(timing.scheme for timing in result.medians):
            own = [timing for timing in result.medians if timing.scheme == name]
            speeds = [timing.decode_tokens_per_second for timing in own]
            axes.plot([timing.context for timing in own], speeds, marker="o", label=name)
        axes.set_xscale("log", base=2)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("context, tokens")
        axes.set_ylabel("decode, tokens per second")
        axes.legend(frameon=False)

    return picture(draw)


def picture(draw: Callable[[Axes], None]) -> str:
    """Return what ``draw`` draws on a pair of axes, as an ``<svg>`` element."""
    text = io.StringIO()
    # A fixed salt gives the same bytes for the same data; fonttype "none" keeps text as text.
    with mpl.rc_context({"svg.hashsalt": "rotormlx", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(9, 4.5), layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        axes.grid(alpha=0.3)
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]


def _against_bits(axes: Axes, rows: Sequence[Row]) -> None:
    for number, row in enumerate(rows):
        low, high = row.kl_interval
        axes.errorbar(
            row.bits_per_value,
            row.kl,
            yerr=[[max(0.0, row.kl - low)], [max(0.0, high - row.kl)]],
            capsize=3,
            label=row.scheme,
            **_style(number),
        )
    _logarithmic(axes, [row.kl for row in rows])
    axes.set_xlabel("true bits per value")
    axes.set_ylabel("mean KL divergence, nats")
    _legend(axes)


def _by_position(axes: Axes, result: quality_run.Result) -> None:
    for number, row in enumerate(result.rows):
        positions = [result.start + 64 * i for i in range(len(row.kl_by_position))]
        axes.plot(positions, row.kl_by_position, label=row.scheme, **_style(number))
    _logarithmic(axes, [kl for row in result.rows for kl in row.kl_by_position])
    axes.set_xlabel("position in the text, tokens")
    axes.set_ylabel("mean KL divergence of 64 predictions, nats")
    _legend(axes)


def _by_layer(axes: Axes, rows: Sequence[Row], label: str, value: Callable[[Any], float]) -> None:
    for number, row in enumerate(rows):
        layers = [error.layer for error in row.layers]
        axes.plot(layers, [value(e) for e in row.layers], label=row.scheme, **_style(number))
    _logarithmic(axes, [value(error) for row in rows for error in row.layers])
    axes.set_xlabel("layer")
    axes.set_ylabel(label)
    _legend(axes)


def _style(number: int) -> dict[str, Any]:
    """Return the colour and the marker of a scheme, by its number."""
    return {
        "color": mpl.colormaps["tab10"](number % 10),
        "marker": "osD^vPX*<>"[(number + number // 10) % 10],
        "markersize": 5,
        "linewidth": 1,
    }


def _logarithmic(axes: Axes, values: Sequence[float]) -> None:
    """Use a logarithmic axis with plain numbers, such as 0.001, if all values are positive."""
    if all(value > 0 for value in values):
        axes.set_yscale("log")
        log_axis(axes.yaxis)


def log_axis(axis: Axis, ticks: Sequence[float] = ()) -> None:
    """Put plain numbers on a logarithmic axis, at the given ticks or at round numbers."""
    if ticks:
        axis.set_ticks(ticks)
    else:
        low, high = axis.get_view_interval()
        subs = (1,) if high / low > 1000 else (1, 2, 5) if high / low > 10 else range(1, 10)
        axis.set_major_locator(LogLocator(subs=tuple(subs)))
    axis.set_major_formatter(FuncFormatter(_plain))
    axis.set_minor_formatter(NullFormatter())


def _plain(value: float, _: int) -> str:
    """Return a tick without an exponent: 0.00001, 32,768."""
    return f"{value:,.10f}".rstrip("0").rstrip(".")


def _legend(axes: Axes) -> None:
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=7, frameon=False)
