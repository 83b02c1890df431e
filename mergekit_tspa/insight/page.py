"""The report on disk: one HTML file that needs nothing else, and its pictures beside it."""

import base64
import re
import struct
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from torch import Tensor

from mergekit_tspa.base.files import replaced
from mergekit_tspa.errors import InputError
from mergekit_tspa.insight.findings import Finding
from mergekit_tspa.insight.inspection import Inspection
from mergekit_tspa.insight.pictures import NAMES, THEMES, Picture, pictures
from mergekit_tspa.methods.inputs import Progress
from mergekit_tspa.symmetry.alignment_report import by_layer

PAGE = "inspect.html"
PNG = "inspect-{}.png"
GENERATOR = "mergekit-tspa inspect"

_TERMS = (
    ("norm", "||D||, the Frobenius norm of an adapter's update D = B A of a weight, LoRA scale included."),
    (
        "effective rank",
        "exp of the entropy of the singular values divided by their sum: 1 if one direction does "
        "everything, r if r "
        "directions are of equal size. Stable rank: ||D||² over the largest squared singular value.",
    ),
    ("cosine", "<D, D'> / (||D|| ||D'||): 1 the same update, 0 orthogonal, below 0 against each other."),
    (
        "overlap",
        "mean squared cosine of the principal angles between the row spaces (what is read) or column spaces "
        "(what is written) of two updates: 1 the same space or one inside the other, 0 orthogonal.",
    ),
    (
        "sign conflict",
        "share of the entries of two updates that have opposite signs, on a seeded sample of rows.",
    ),
    (
        "cross terms",
        "||sum a D||² / sum ||a D||² - 1: what meeting adds to the energy of the weighted sum, or takes "
        "away; "
        "||sum|| / sum of norms is 1 if all point one way, 1/sqrt(n) for n orthogonal updates of equal size.",
    ),
    (
        "distance",
        "of a full model's layer to the base's, ||W - W_0|| / ||W_0|| over the tensors with symmetries.",
    ),
    ("survives", "<M, D> / ||D||² of the merged update M: the part of an adapter that is still in it."),
)
Table = tuple  # name, columns, rows, indices of columns of text


def check_out(out: Path, page: str = PAGE, generator: str = GENERATOR) -> None:
    """
    Args:
        page: which file the report is
        generator: what it says of who made it

    Raises:
        InputError: it is no directory, or holds a page of that name that is not ours.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: is a file; name a directory for the report")
    for name in ("adapter_config.json", "config.json"):
        if (out / name).exists():
            raise InputError(f"{out}: holds an adapter or a model; name another directory for the report")
    if (out / page).is_file() and generator.encode() not in (out / page).read_bytes()[:4096]:
        raise InputError(f"{out}: holds an {page} that is not a report; name another directory")


def drawn(picture: Picture, out: Path, png: str) -> dict[str, Any]:
    """Write a picture for a light and a dark ground, and return what the page's template needs of it.

    Args:
        png: the files' name, with `{}` where the picture's goes
    """
    light, dark = pngs = [picture.png(theme) for theme in THEMES]
    for theme, data in zip(THEMES, pngs):
        (out / png.format(picture.name + theme.suffix)).write_bytes(data)
    return {
        "name": picture.name,
        "title": picture.title,
        "caption": picture.caption,
        "alt": picture.alt,
        "light": _uri(light),
        "dark": _uri(dark),
        "size": struct.unpack(">II", light[16:24]),
    }


def render(out: Path, page: str, template: str, **values: Any) -> None:
    """Write a page, which takes its name when it is whole."""
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    html = environment.get_template(template).render(**values)
    with replaced(out / page) as file:
        file.write_text(html, encoding="utf-8", errors="replace")


def write_page(ins: Inspection, found: Sequence[Finding], out: Path, progress: Progress) -> Path:
    """Write the pictures, then the page, which takes its name when it is whole; files of an earlier report go
    first.

    Raises:
        InputError: a file cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / PAGE).unlink(missing_ok=True)
        for name, theme in product(NAMES, THEMES):
            (out / PNG.format(name + theme.suffix)).unlink(missing_ok=True)
        seen, todo = [], list(pictures(ins))
        for done, picture in enumerate(todo):
            progress("drawing", done / len(todo))
            seen.append(drawn(picture, out, PNG) | {"tables": list(_tables(ins, picture.name))})
        progress("drawing", 1.0)
        render(
            out,
            PAGE,
            "inspect.html.j2",
            generator=GENERATOR,
            title=f"{ins.title}: {', '.join(ins.names)}",
            subtitle=_subtitle(ins),
            findings=found,
            pictures=seen,
            tables=[_adapters(ins), *_alignment(ins)],
            modules=_modules(ins),
            terms=_TERMS,
            merged=ins.merge is not None,
        )
    except OSError as error:
        raise InputError(f"{out}: the report could not be written: {error}") from error
    return out / PAGE


def _uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _subtitle(ins: Inspection) -> str:
    layers = f"{len(ins.layers)} layers, " if ins.layers else ""
    bases = [ins.base] if ins.base else sorted({adapter.base for adapter in ins.adapters if adapter.base})
    base = f"; base {', '.join(bases)}" if bases else ""
    return (
        f"{len(ins.tensors)} weights in {layers}{', '.join(dict.fromkeys(p.kind for p in ins.places))}{base}"
    )


def _number(value: float, form: str = ".3g") -> str:
    text = format(value, form) if value == value else "–"
    return text if re.search("[1-9]", text) else text.removeprefix("-")


def _adapters(ins: Inspection) -> Table:
    m, rows = ins.measures, []
    for t, adapter in enumerate(ins.adapters):
        touched = m.norm[:, t] > 0
        weights, ranks = ins.weights[touched, t], sorted({module.rank for module in adapter.modules.values()})
        spread = sorted({weights.min().item(), weights.max().item()}) if len(weights) else []
        rows.append(
            (
                ins.names[t],
                ins.kinds_of[t],
                " to ".join(str(r) for r in sorted({ranks[0], ranks[-1]})) if ranks else "–",
                str(int(touched.sum())),
                " to ".join(f"{w:g}" for w in spread) or "–",
                _number(ins.total_norms()[t].item()),
                _number(m.effective_rank[:, t].nanmean().item()),
                _number(m.stable_rank[:, t].nanmean().item()),
                adapter.name,
            )
        )
    columns = (
        "adapter",
        "kind",
        "rank",
        "weights changed",
        "weight",
        "norm",
        "effective rank",
        "stable rank",
        "path",
    )
    return "Adapters", columns, rows, (1, 8)


def _alignment(ins: Inspection) -> Iterator[Table]:
    """Of full models that were aligned, how far each layer was from the base's."""
    rows = [
        (ins.names[t], row.layer, row.what, f"{row.matched:.1%}", f"{row.before:.3f}", f"{row.after:.3f}")
        for t, adapter in enumerate(ins.adapters)
        if adapter.aligned is not None
        for row in by_layer(adapter.aligned.known)
    ]
    if rows:
        columns = ("model", "layer", "what", "in place", "distance before", "after alignment")
        yield "Alignment", columns, rows, (0, 1, 2)


def _tables(ins: Inspection, picture: str) -> Iterator[Table]:
    """What stands below a picture."""
    if picture == "pairs":
        yield _pairs(ins)
    elif picture == "survival":
        share, cosine = ins.total_survival()
        modules, _ = ins.survival()
        rows: list[tuple[str, ...]] = [
            (
                name,
                _number(share[t].item(), ".1%"),
                _number(cosine[t].item(), ".3f"),
                *_extreme(ins, modules[:, t], "min"),
                *_extreme(ins, modules[:, t], "max"),
            )
            for t, name in enumerate(ins.names)
        ]
        yield "What survives", ("adapter", "survives", "cosine", "least", "in", "most", "in"), rows, (4, 6)
    elif picture == "objectives":
        rows = [
            (
                s.name,
                str(len(s.problems)),
                _number(s.start.sum().item(), ".4g"),
                _number(s.end.sum().item(), ".4g"),
                _number((s.end.sum() / s.start.sum() - 1).item(), "+.1%"),
                *(
                    f"{s.angles[:, t].nanmean():.0f}°, {s.scales[:, t].nanmean():.2f}"
                    for t in range(len(ins.names))
                ),
            )
            for s in ins.stages()
        ]
        turned = [f"{name}: angle, scale" for name in ins.names]
        yield "Stages", ("stage", "problems", "objective before", "after", "change", *turned), rows, ()


def _extreme(ins: Inspection, values: Tensor, which: str) -> tuple[str, str]:
    known = [(value, i) for i, value in enumerate(values.tolist()) if value == value]
    if not known:
        return "–", "–"
    value, i = min(known) if which == "min" else max(known)
    return f"{value:.1%}", _place(ins, i)


def _place(ins: Inspection, module: int) -> str:
    place = ins.places[module]
    return place.kind if place.layer is None else f"layer {place.layer} {place.kind}"


def _pairs(ins: Inspection) -> Table:
    m, cosines, rows = ins.measures, ins.total_cosines(), []
    for t, u in ins.pairs:
        shared = ins.shared[:, t, u]
        least = ins.pulls[:, t, u]
        worst = int(least.nan_to_num(2).argmin())
        means = [values[:, t, u].nanmean().item() for values in (m.conflict, m.overlap_in, m.overlap_out)]
        angles = [values[:, t, u].nanmean().item() for values in (m.angle_in, m.angle_out)]
        rows.append(
            (
                f"{ins.names[t]} and {ins.names[u]}",
                str(int(shared.sum())),
                _number(cosines[t, u].item(), ".3f"),
                *(_number(mean, ".1%") for mean in means),
                *(_number(angle, ".1f") for angle in angles),
                _number(least[worst].item(), ".3f"),
                _place(ins, worst) if shared.any() else "–",
            )
        )
    columns: tuple[str, ...] = (
        "pair",
        "shared weights",
        "cosine",
        "sign conflict",
        "overlap read",
        "overlap written",
    )
    columns += ("smallest angle read, mean (°)", "smallest angle written, mean (°)", "smallest cosine", "in")
    return "Pairs", columns, rows, (9,)


def _modules(ins: Inspection) -> Table:
    """A row per layer and kind; means, where a layer has several such weights (experts)."""
    m, n = ins.measures, len(ins.names)
    groups: dict[tuple, list[int]] = {}
    for i, place in enumerate(ins.places):
        groups.setdefault((place.layer is None, place.layer or 0, place.kind), []).append(i)
    columns = ["weight", *(f"{name}: norm, eff. rank" for name in ins.names)]
    if ins.pairs:
        columns += ["||sum|| / norms", "cross terms", "sign conflict", "overlap read", "overlap written"]
        columns += ["smallest cosine", "between"]
    if ins.merge:
        columns += [f"{name}: survives" for name in ins.names]
    rows = []
    compared = [ins.of_pairs(values) for values in (m.conflict, m.overlap_in, m.overlap_out)]
    for key in sorted(groups):
        where = groups[key]
        name = _place(ins, where[0]) + (f" ({len(where)}, means)" if len(where) > 1 else "")
        row = [name]
        for t in range(n):
            norm, rank = (v[where, t].nanmean().item() for v in (m.norm, m.effective_rank))
            row.append(f"{norm:.3g}, {rank:.1f}" if norm == norm else "–")
        if ins.pairs:
            added = (ins.ratio, ".2f"), (ins.cross, "+.1%")
            row += [_number(v[where].nanmean().item(), form) for v, form in added]
            row += [_number(v[where].nanmean().item(), ".1%") for v in compared]
            least = ins.of_pairs(ins.pulls)[where].nan_to_num(2).amin(0)
            t, u = ins.pairs[int(least.argmin())]
            known = least.min() < 2
            row += [f"{least.min():.3f}", f"{ins.names[t]} and {ins.names[u]}"] if known else ["–", "–"]
        if ins.merge:
            share, _ = ins.survival()
            row += [_number(share[where, t].nanmean().item(), ".1%") for t in range(n)]
        rows.append(row)
    texts = (columns.index("between"),) if ins.pairs else ()
    return "All weights", columns, rows, texts
