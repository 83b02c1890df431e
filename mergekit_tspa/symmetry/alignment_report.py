"""How far a model was from being aligned, layer by layer and in one sentence."""

import re
from collections.abc import Iterable
from typing import NamedTuple

from mergekit_tspa.symmetry.align import Aligned, AlignedModel
from mergekit_tspa.symmetry.blocks import Block


class Row(NamedTuple):
    """The MLPs of a layer, or its attention; norms are over their tensors."""

    layer: str
    what: str  # units, or heads
    matched: float  # share of them that were in their places
    turned: bool  # whether any changes its place or is turned
    before: float  # ||W - W_0|| / ||W_0||, with W_0 of the anchor
    after: float


def by_layer(found: Iterable[tuple[Block, Aligned]]) -> list[Row]:
    """A row for each layer and kind of block, by layer; experts of a layer are put together."""
    groups: dict[tuple[str, str], list[Aligned]] = {}
    for block, aligned in found:
        layer = re.match(r"(.*?\.\d+)\.", f"{block.name}.")
        what = "heads" if block.geometry else "units"
        groups.setdefault((layer[1] if layer else block.name, what), []).append(aligned)
    # Layer 2 comes before layer 10, and the units of each before its heads.
    order = sorted(groups, key=lambda place: ([int(part) for part in re.findall(r"\d+", place[0])], *place))
    return [_row(layer, what, groups[layer, what]) for layer, what in order]


def _row(layer: str, what: str, group: list[Aligned]) -> Row:
    before, after, size = (sum(getattr(a, part) for a in group) for part in ("before", "after", "size"))
    matched = sum(a.matched for a in group) / len(group)
    moved = any(a.maps for a in group)
    return Row(layer, what, matched, moved, *((x / size) ** 0.5 if size else 0.0 for x in (before, after)))


def summary(model: AlignedModel) -> str:
    """What alignment did to the blocks that were read so far, in one sentence."""
    found = model.known
    moved = [(block, aligned) for block, aligned in found if aligned.maps]
    if not moved:
        return (
            f"{model.name}: alignment had nothing to do: the units and heads of all {len(found)} blocks are "
            f"where those of {model.anchor.name} are"
        )
    whole = _row("", "", [aligned for _, aligned in found])
    shares = [
        f"{sum(a.matched for _, a in of) / len(of):.1%} of the {what}"
        for what, heads in (("hidden units", False), ("heads", True))
        if (of := [(block, a) for block, a in found if bool(block.geometry) is heads])
    ]
    return (
        f"{model.name}: {len(moved)} of {len(found)} blocks were turned towards {model.anchor.name}, where "
        f"{' and '.join(shares)} were in their places; ||W - W_0|| / ||W_0|| of these blocks went from "
        f"{whole.before:.3f} to {whole.after:.3f}"
    )
