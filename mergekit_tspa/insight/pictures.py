"""Pictures of an inspection, each in a light and a dark version on a transparent ground; drawn without a
display.
"""

import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
from matplotlib.colors import CenteredNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from torch import Tensor

from mergekit_tspa.insight.inspection import Inspection

WIDTH = 8.6  # inches
MOST_PAIRS = 10  # strips of pairs
NAMES = ("norms", "ranks", "pairs", "meeting", "pulls", "survival", "objectives", "angles", "scales")


class Theme(NamedTuple):
    """Colours; the maps are legible with every kind of colour vision, and their middle recedes into the
    ground.
    """

    suffix: str
    text: str
    missing: str  # where there is no value
    diverging: str  # low: warm
    lines: tuple[str, ...]


THEMES = (
    Theme("", "#1f2328", "#e4e6e9", "RdBu", ("#0072b2", "#d55e00", "#009e73")),
    Theme("-dark", "#e6edf3", "#30363d", "berlin_r", ("#56b4e9", "#e69f00", "#2fc79a")),
)
SEQUENTIAL = "viridis"
COSINE, CONFLICT = 0.2, 0.05  # least reach of the colours of cosines, shares of energy, and of signs


class Picture(NamedTuple):
    name: str  # of its files
    title: str
    caption: str
    alt: str
    draw: Callable[[Theme], Figure]

    def png(self, theme: Theme) -> bytes:
        style: dict[Any, Any] = {  # the type of a name lists them all
            "text.parse_math": False,
            "font.size": 9,
            "axes.titlesize": 9,
            "axes.titlelocation": "left",
        }
        style |= dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor"), theme.text)
        style |= dict.fromkeys(("xtick.color", "ytick.color"), theme.text)
        with matplotlib.rc_context(style), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing")  # names may be in any script
            figure, file = self.draw(theme), io.BytesIO()
            figure.savefig(file, format="png", dpi=144, transparent=True, metadata={"Software": None})
        return file.getvalue()


class Strip(NamedTuple):
    """Values over layers, one row of colours per kind of module or per adapter."""

    title: str
    values: Tensor  # (rows, layers)
    label: str  # of the colours, with the unit
    reach: float = 0.0  # how far the colours go at least, so that noise is not vivid
    centre: float | None = None  # of diverging colours; None: sequential ones, from 0
    high_is_bad: bool = False


def pictures(ins: Inspection) -> Iterator[Picture]:
    """Those that the inspection has numbers for."""
    if ins.layers:
        yield _adapters_picture(
            *(ins, "norms", "Norms", ins.measures.norm, "||D||"),
            "How much each adapter changes each weight: the Frobenius norm of its update, without weights.",
        )
        yield _adapters_picture(
            *(ins, "ranks", "Effective ranks", ins.measures.effective_rank, "effective rank"),
            "How many directions each update really uses: the exponential of the entropy of its singular "
            "values.",
        )
    if ins.of_pairs(ins.shared).any():
        yield _pairs_picture(ins)
        if ins.layers:
            yield _meeting_picture(ins)
            yield _pulls_picture(ins)
    if ins.layers and ins.merge:
        share, _ = ins.survival()
        if not share.isnan().all():
            yield _adapters_picture(
                *(ins, "survival", f"What survives in {ins.merge.method}", share, "<M, D> / ||D||²"),
                "1: all of the adapter's update is in the merged one; 0: none; above its weight: it is "
                "counted more than once.",
                reach=1.0,
            )
        yield from _stage_pictures(ins)


# -- strips: rows of colours over layers
# ----------------------------------------------------------------------


def _adapters_picture(
    ins: Inspection, name: str, title: str, values: Tensor, label: str, caption: str, reach: float = 0.0
) -> Picture:
    """One strip per adapter of values (m, n)."""
    strips = [Strip(adapter, ins.grid(values[:, t]), label, reach) for t, adapter in enumerate(ins.names)]
    return _strips_picture(name, title, caption, strips, ins.kinds, ins.layers)


def _strips_picture(
    name: str,
    title: str,
    caption: str,
    strips: Sequence[Strip],
    rows: Sequence[str],
    layers: Sequence[int],
    together: bool = True,
) -> Picture:
    """Strips below each other, of the layers that have values.

    Args:
        together: with one scale of colours for all
    """
    known = [i for i in range(len(layers)) if any(not strip.values[:, i].isnan().all() for strip in strips)]
    strips, layers = [s._replace(values=s.values[:, known]) for s in strips], [layers[i] for i in known]
    alt = [f"{strip.title}: {_extremes(strip.values, rows, layers)}." for strip in strips]
    draw = partial(_draw_strips, strips=strips, rows=rows, layers=layers, together=together)
    return Picture(name, title, caption, " ".join([f"{title}, in colours over layers.", *alt]), draw)


def _extremes(values: Tensor, rows: Sequence[str], layers: Sequence[int]) -> str:
    """Such as `0.2 (layer 3 v_proj) to 1.4 (layer 9 q_proj)`."""
    if values.isnan().all():
        return "not measured"
    ends = []
    for filler, pick in ((torch.inf, torch.argmin), (-torch.inf, torch.argmax)):
        row, layer = divmod(int(pick(values.nan_to_num(filler))), values.shape[1])
        ends.append(f"{values[row, layer]:.3g} (layer {layers[layer]} {rows[row]})")
    return " to ".join(ends)


def _draw_strips(
    theme: Theme, strips: Sequence[Strip], rows: Sequence[str], layers: Sequence[int], together: bool
) -> Figure:
    height = max(0.2 * len(rows), 0.3 if together else 0.65) + 0.42
    figure = Figure(figsize=(WIDTH, 0.35 + height * len(strips)), layout="constrained")
    axes = figure.subplots(len(strips), sharex=True, squeeze=False)[:, 0]
    everything = torch.stack([strip.values for strip in strips])
    for ax, strip in zip(axes, strips):
        scale = _colours(theme, everything if together else strip.values, strip)
        image = ax.imshow(strip.values, aspect="auto", interpolation="nearest", **scale)
        ax.set_title(strip.title)
        ax.set_yticks(range(len(rows)), rows)
        _bare(ax, theme)
        if not together:
            _colour_bar(figure, image, ax, strip.label)
    _layer_axis(axes[-1], layers)
    if together:
        _colour_bar(figure, image, axes, strips[0].label, shrink=min(1.0, 3 / (height * len(strips))))
    return figure


def _colours(theme: Theme, values: Tensor, strip: Strip) -> dict:
    """Warm colours are bad ones, where there is a middle."""
    centre = strip.centre
    known = values[~values.isnan()]
    low, high = (known.min().item(), known.max().item()) if len(known) else (0.0, 1.0)
    if centre is None:
        low, high = min(low, 0.0), max(high, strip.reach)
        cmap, norm = matplotlib.colormaps[SEQUENTIAL], Normalize(low, high if high > low else 1)
    else:
        reach = max(high - centre, centre - low, strip.reach)
        cmap, norm = matplotlib.colormaps[theme.diverging], CenteredNorm(centre, reach)
        cmap = cmap.reversed() if strip.high_is_bad else cmap
    return {"cmap": cmap.with_extremes(bad=theme.missing), "norm": norm}


def _colour_bar(figure: Figure, image, axes, label: str, **layout) -> None:
    bar = figure.colorbar(image, ax=axes, pad=0.015, aspect=14 if not layout else 20, **layout)
    bar.set_label(label)
    bar.outline.set_visible(False)
    bar.ax.yaxis.set_major_locator(MaxNLocator(4))


def _layer_axis(ax, layers: Sequence[int]) -> None:
    ax.set_xlabel("layer")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, nbins=12))
    ax.xaxis.set_major_formatter(
        FuncFormatter(lambda x, _: str(layers[int(x)]) if x in range(len(layers)) else "")
    )


def _bare(ax, theme: Theme) -> None:
    ax.set_facecolor(theme.missing)
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)


def _meeting_picture(ins: Inspection) -> Picture:
    m = ins.measures

    def over_pairs(values: Tensor) -> Tensor:
        return ins.grid(ins.of_pairs(values).nanmean(1))

    strips = [
        Strip(
            "Cross terms: energy they add to the sum, or take away", ins.grid(ins.cross), "share", COSINE, 0.0
        ),
        Strip("||sum|| against the sum of norms", ins.grid(ins.ratio), "ratio", 1.0),
        Strip(
            "Sign conflict, mean over pairs; 0.5 is chance",
            over_pairs(m.conflict),
            "share",
            CONFLICT,
            0.5,
            True,
        ),
        Strip(
            "Overlap of what is read (row spaces), mean over pairs", over_pairs(m.overlap_in), "cos²", COSINE
        ),
        Strip(
            "Overlap of what is written (column spaces), mean over pairs",
            over_pairs(m.overlap_out),
            "cos²",
            COSINE,
        ),
    ]
    caption = "Red: they cancel; blue: they add up. Overlap 1: the same directions, 0: orthogonal ones."
    return _strips_picture(
        "meeting", "Where they meet, and how", caption, strips, ins.kinds, ins.layers, together=False
    )


def _pulls_picture(ins: Inspection) -> Picture:
    grids = {pair: ins.grid(pulls) for pair, pulls in zip(ins.pairs, ins.of_pairs(ins.pulls).T)}
    met = {pair: grid for pair, grid in grids.items() if not grid.isnan().all()}
    order = sorted(met, key=lambda pair: met[pair].nan_to_num(1).min())[:MOST_PAIRS]
    strips = [Strip(f"{ins.names[t]} and {ins.names[u]}", met[t, u], "cosine", COSINE, 0.0) for t, u in order]
    caption = "Cosine of two updates. Red: they pull against each other; blue: they point the same way."
    if len(order) < len(met):
        caption += f" The {len(order)} of {len(met)} pairs with the smallest cosines."
    return _strips_picture("pulls", "Who fights where", caption, strips, ins.kinds, ins.layers)


# -- matrices and lines
# ---------------------------------------------------------------------------------------


def _pairs_picture(ins: Inspection) -> Picture:
    m, names = ins.measures, ins.names
    off = ~torch.eye(len(names), dtype=torch.bool)
    panels = [
        panel._replace(values=panel.values.where(off, torch.nan))
        for panel in (
            Strip("Cosine", ins.total_cosines(), "", COSINE, 0.0),
            Strip("Sign conflict; 0.5 is chance", m.conflict.nanmean(0), "", CONFLICT, 0.5, True),
            Strip("Overlap of what is read (row spaces)", m.overlap_in.nanmean(0), "", 1.0),
            Strip("Overlap of what is written (column spaces)", m.overlap_out.nanmean(0), "", 1.0),
        )
    ]

    def draw(theme: Theme) -> Figure:
        side = max(2.6, 0.42 * len(names) + 1.3)
        figure = Figure(figsize=(max(WIDTH, 2 * side), 2 * side), layout="constrained")
        for ax, panel in zip(figure.subplots(2, 2).flat, panels):
            values = panel.values
            image = ax.imshow(values, **_colours(theme, values, panel))
            ax.set_title(panel.title)
            ax.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor")
            ax.set_yticks(range(len(names)), names)
            _bare(ax, theme)
            for t, u in np.argwhere(~values.isnan().numpy()):
                red, green, blue, _ = image.cmap(image.norm(values[t, u]))
                bright = 0.299 * red + 0.587 * green + 0.114 * blue > 0.5
                ax.text(
                    u,
                    t,
                    f"{values[t, u]:.2f}",
                    ha="center",
                    va="center",
                    fontsize=7.5,
                    color="k" if bright else "w",
                )
        return figure

    alt = "Four tables of pairs of adapters: " + "; ".join(
        f"{p.title}: {p.values[~p.values.isnan()].min():.2f} to {p.values[~p.values.isnan()].max():.2f}"
        for p in panels
    )
    return Picture(
        "pairs",
        "Pair by pair",
        "Cosines of the whole updates; means over shared modules of the share of opposite signs and of the "
        "squared cosines of principal angles. The numbers are in the table below.",
        alt + ".",
        draw,
    )


def _stage_pictures(ins: Inspection) -> Iterator[Picture]:
    """Objectives, angles and scales of TSPA; scales only where one moved."""
    stages = ins.stages()
    if not stages:
        return
    layers = [[ins.layer_of(problem) for problem in stage.problems] for stage in stages]
    kept = [stage.end / stage.start.where(stage.start > 0, torch.nan) for stage in stages]
    shares = [_by_layer(*pair, ins.layers)[0] for pair in zip(layers, (share[:, None] for share in kept))]
    alt = " ".join(
        f"{stage.name}: from {stage.start.sum():.4g} to {stage.end.sum():.4g} in all." for stage in stages
    )
    yield Picture(
        *("objectives", "TSPA's objectives"),
        "What is left of each stage's objective, layer by layer; the mean, where it has several weights in "
        "a layer.",
        f"Objective after the stage as a share of that before, over layers. {alt}",
        partial(_draw_objectives, names=[stage.name for stage in stages], shares=shares, layers=ins.layers),
    )
    angles = [
        Strip(stage.name, _by_layer(where, stage.angles, ins.layers), "degrees")
        for stage, where in zip(stages, layers)
    ]
    caption = (
        "How far each adapter is turned: the angle whose cosine is the mean cosine of its rotation. 0: not "
        "at all, 90: on average perpendicular. Turns belong to the factors as they are stored."
    )
    yield _strips_picture("angles", "Rotation angles", caption, angles, ins.names, ins.layers)
    scales = [
        Strip(stage.name, _by_layer(where, stage.scales.log2(), ins.layers), "log₂ s", 0.1, 0.0)
        for stage, where in zip(stages, layers)
        if (stage.scales.nan_to_num(1) != 1).any()
    ]
    if scales:
        caption = (
            "Of the factors of each adapter, s on one side and 1/s on the other. "
            "Stages without them leave s at 1."
        )
        yield _strips_picture("scales", "Scales", caption, scales, ins.names, ins.layers)


def _draw_objectives(
    theme: Theme, names: Sequence[str], shares: Sequence[Tensor], layers: Sequence[int]
) -> Figure:
    figure = Figure(figsize=(WIDTH, 2.6), layout="constrained")
    ax = figure.subplots()
    ax.patch.set_alpha(0)
    for name, share, colour, marker in zip(names, shares, theme.lines, "os^"):
        known = [i for i, value in enumerate(share.tolist()) if value == value]
        ax.plot(known, share[known], label=name, color=colour, marker=marker, markersize=4, linewidth=1)
    ax.set_ylabel("objective, end / start")
    ax.set_ylim(0)
    ax.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False)
    _layer_axis(ax, layers)
    return figure


def _by_layer(layers: Sequence[int | None], values: Tensor, every: Sequence[int]) -> Tensor:
    """Means of `values (problems, n)` over the problems of each layer  # (n, layers)"""
    rows = [[i for i, layer in enumerate(layers) if layer == wanted] for wanted in every]
    empty = values.new_full(values.shape[1:], torch.nan)
    return torch.stack([values[row].nanmean(0) if row else empty for row in rows], 1)
