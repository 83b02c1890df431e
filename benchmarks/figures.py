"""The tables and the picture of README and docs that are made of the results: `python benchmarks/figures.py`.

Reads `benchmarks/results/examples.md` and `quality.md`, writes the tables between `<!-- python benchmarks/figures.py: NAME -->`
and `<!-- end -->` anew, and draws `docs/pictures/retained.png` and its dark version.  `--check` only says which tables are old.
"""

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TABLE = re.compile(r"(<!-- python benchmarks/figures\.py: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)

SETS = {  # directory: what its adapters are
    "r8-qv": "rank 8, `q` `v`, one seed",
    "r8-qv-seeds": "rank 8, `q` `v`, a seed each",
    "r16-all": "rank 16, all linear layers, a seed each",
}
SUM = "sum of the ranks"
ONE = "one adapter's"


class Merge(NamedTuple):
    """A merge of the tables."""

    name: str
    rows: Sequence[str]  # its labels in examples.md, the first that a set has counts
    needs: str
    rank: str
    cost: str  # seconds on one core of the machine of the results, for all three sets


DISTILL = Merge(
    "`distill`",
    ["distill, 32 texts", "distill, 32 texts, 96 steps", "distill, 32 texts, 64 steps"],
    "32 texts each",
    ONE,
    "24 to 32 minutes",
)
REGMEAN = Merge("`regmean`", ["regmean, 8 texts"], "8 texts each", ONE, "1 to 4 minutes")
SELF = Merge(
    "`regmean`, `examples: self`",
    ["regmean, self", "regmean, self, temperature 0.7, 12 dev texts"],
    "none: the adapters write",
    ONE,
    "1.5 to 5 minutes",
)
TSV = Merge("`core_tsv`", ["core_tsv"], "-", SUM, "0 to 3 s")
ISO = Merge("`core_iso`, lambda 3, `pico`", ["core_iso, lambda 3, pico"], "-", SUM, "1 to 5 s")
BOTH_AROUND = Merge(
    "`core_tsv`, lambda 2, `pico`, `svc`", ["core_tsv, lambda 2, pico, svc"], "-", SUM, "1 to 13 s"
)
SHORT_SUM = Merge("`core_task_arithmetic`, weight 0.4", ["sum, weight 0.4"], "-", SUM, "0 to 1 s")
FIVE = [DISTILL, REGMEAN, SELF, ISO, SHORT_SUM]
WITH_TEXTS = [
    DISTILL,
    Merge("`regmean_plus`", ["regmean_plus, 32 texts"], "32 texts each", ONE, "3 to 13 minutes"),
    Merge("`regmean`", ["regmean, 32 texts"], "32 texts each", ONE, "2 to 6 minutes"),
    REGMEAN,
    SELF,
]
WITHOUT = [
    ISO,
    BOTH_AROUND,
    TSV,
    Merge("`swudi_a`", ["swudi_a"], "-", SUM, "0 to 4 s"),
    Merge("`actmat`", ["actmat, ridge 1"], "-", SUM, "0 to 2 s"),
    Merge("`actmat`, ridge 3", ["actmat, ridge 3"], "-", SUM, "0 to 4 s"),
    SHORT_SUM,
]
DRAWN = [DISTILL, REGMEAN, SELF, ISO, TSV, SHORT_SUM]

LOSSES = [  # rows of quality.md that docs/choosing.md shows
    "base",
    "single adapter, on its own task",
    "core_tsv",
    "core_tsv, rank 8",
    "ctm_tsv",
    "tspa_lora",
    "tspa_lora, target_scale 1.0",
    "ctm_iso",
    "lora_emr",
    "lora_ties",
    "lora_della",
    "ctm_ties",
    "lora_task_arithmetic, weight 0.5",
    "lora_dare_ties",
    "knots_ties, scope model",
    "lora_pcb",
    "core_ties",
    "tspa_attention, target_scale 1.0",
    "svd_cur",
    "lora_mean",
    "tspa, target_scale 1.0",
    "lora_lego",
    "factor_ties",
    "robustmerge",
    "lora_task_arithmetic",
    "robustmerge_code",
    "factor_linear",
    "tspa_pairwise",
    "rotation",
]


class Kept(NamedTuple):
    """The share of the gains that a merge retains."""

    mean: float
    low: float | None
    high: float | None
    texts: int


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def kept(at_most: int = 24) -> dict[tuple[str, str], Kept]:
    """`{(set, label): share}`, of the most dev texts, up to so many, where a merge was judged more than once."""
    found: dict[tuple[str, str], Kept] = {}
    texts = 24
    for line in (RESULTS / "examples.md").read_text(encoding="utf-8").splitlines():
        if "12 dev texts" in line and not line.startswith("|"):
            texts = 12
        cells = _cells(line)
        if len(cells) < 4 or not re.fullmatch(r"0?\.\d+|1\.\d+", cells[2]):
            continue
        low, _, high = cells[3].partition(" to ")
        interval = (float(low), float(high)) if high else (None, None)
        new = Kept(float(cells[2]), *interval, texts)
        old = found.get((cells[0], cells[1]))
        if new.texts <= at_most and (old is None or old.texts < new.texts):
            found[cells[0], cells[1]] = new
    return found


def losses() -> tuple[list[str], dict[str, list[str]]]:
    """The sets of quality.md, and `{label: a loss of each set}`."""
    rows: dict[str, list[str]] = {}
    sets: list[str] = []
    for line in (RESULTS / "quality.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("| "):
            label, *cells = _cells(line)
            if label.startswith("method"):
                sets.extend(cells)
                start = len(sets) - len(cells)
            else:
                row = rows.setdefault(label, [])
                row.extend(["-"] * (start - len(row)) + cells)
    return sets, {label: row + ["-"] * (len(sets) - len(row)) for label, row in rows.items()}


def _of(merge: Merge, of: str, found: dict[tuple[str, str], Kept]) -> Kept | None:
    return next((found[of, label] for label in merge.rows if (of, label) in found), None)


def _short(x: float) -> str:
    return f"{x:.2f}".removeprefix("0")


def shares(merges: Sequence[Merge], texts: int = 24) -> str:
    """A table of what merges retain; * marks 12 texts a task, where others have 24."""
    found = kept(texts)
    lines = [
        f"| method | needs | rank of the result | {' | '.join(SETS.values())} | time to merge |",
        f"|---|---|---|{'---|' * len(SETS)}---|",
    ]
    for merge in merges:
        cells = []
        for of in SETS:
            share = _of(merge, of, found)
            if share is None:
                cells.append("not run")
                continue
            interval = "" if share.low is None else f" ({_short(share.low)} to {_short(share.high)})"
            cells.append(_short(share.mean) + interval + ("" if share.texts == texts else r" \*"))
        lines.append(f"| {merge.name} | {merge.needs} | {merge.rank} | {' | '.join(cells)} | {merge.cost} |")
    day = re.search(r"\d{4}-\d\d-\d\d", (RESULTS / "examples.md").read_text(encoding="utf-8"))[0]
    judged = f"{texts} unseen texts a task" + (r", \* 12" if any(r"\*" in line for line in lines) else "")
    lines += [
        "",
        f"`python benchmarks/examples.py`, {day}, one thread; {judged}. Single adapters have 1, the base 0.",
    ]
    return "\n".join(lines)


def loss_table() -> str:
    """Losses with base and single adapters, and the share retained that follows from them."""
    sets, rows = losses()
    base, single = rows["base"], rows["single adapter, on its own task"]
    columns = [i for i, name in enumerate(sets) if name in ("r8-qv", "r32-qv")]
    titles = [
        f"{title} {sets[i].split('-')[0][1:]}" for i in columns for title in ("loss, rank", "retained, rank")
    ]
    lines = [f"| method, weight 1 unless stated | {' | '.join(titles)} |", f"|---|{'---|' * len(titles)}"]
    for label in LOSSES:
        name, _, rest = label.partition(",")
        name = f"`{name}`" if label not in ("base", "single adapter, on its own task") else name
        cells = []
        for i in columns:
            share = (float(base[i]) - float(rows[label][i])) / (float(base[i]) - float(single[i]))
            cells += [rows[label][i], f"{share:.2f}"]
        lines.append(f"| {name}{',' if rest else ''}{rest} | {' | '.join(cells)} |")
    return "\n".join(lines)


MADE = {
    "five": lambda: shares(FIVE),
    "texts": lambda: shares(WITH_TEXTS),
    "free": lambda: shares(WITHOUT),
    "losses": loss_table,
}


def renewed(page: str) -> str:
    """The text of a page with its tables made anew."""
    return TABLE.sub(lambda m: f"{m[1]}{MADE[m[2]]()}\n{m[3]}", page)


def draw() -> None:
    """One picture on white and one on dark: a row a method, a point a set."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = kept()
    for name, ink, ground, colours in (
        ("retained", "#1f2328", "#ffffff", ["#0969da", "#8250df", "#bc4c00"]),
        ("retained-dark", "#e6edf3", "#0d1117", ["#58a6ff", "#bc8cff", "#f0883e"]),
    ):
        plt.rcParams.update({"font.size": 10, "font.family": "DejaVu Sans", "svg.hashsalt": "fixed"})
        figure, axes = plt.subplots(figsize=(8.4, 3.3), facecolor=ground)
        axes.set_facecolor(ground)
        for s, (of, colour) in enumerate(zip(SETS, colours)):
            for row, merge in enumerate(DRAWN):
                if share := _of(merge, of, found):
                    y = row + (s - 1) * 0.22
                    if share.low is not None:
                        axes.plot([share.low, share.high], [y, y], color=colour, lw=1.6, alpha=0.6)
                    hollow = {} if share.texts == 24 else {"markerfacecolor": ground}
                    axes.plot([share.mean], [y], "oDs"[s], color=colour, ms=6, **hollow)
            axes.plot([], [], "oDs"[s], color=colour, ms=6, label=SETS[of].replace("`", ""))
        axes.set_yticks(range(len(DRAWN)))
        axes.set_yticklabels(
            [f"{m.name.replace('`', '')}{'' if m.needs == '-' else f' ({m.needs})'}" for m in DRAWN]
        )
        axes.invert_yaxis()
        axes.set_xlim(0.3, 1.0)
        axes.set_xlabel(
            "share of the single adapters' gain that the merge keeps, with 95 % intervals\n"
            "filled: judged by 24 texts a task, hollow: by 12"
        )
        axes.grid(axis="x", color=ink, alpha=0.15)
        for side in axes.spines.values():
            side.set_visible(False)
        axes.tick_params(colors=ink, length=0)
        axes.xaxis.label.set_color(ink)
        axes.legend(
            loc="lower center", bbox_to_anchor=(0.35, 1.0), ncol=3, frameon=False, labelcolor=ink,
            handletextpad=0.2, columnspacing=1.2, fontsize=9,
        )  # fmt: skip
        figure.savefig(
            ROOT / f"docs/pictures/{name}.png", dpi=130, bbox_inches="tight", facecolor=ground,
            metadata={"Software": None},
        )  # fmt: skip
        plt.close(figure)


def main() -> int:
    """Renew, or with `--check` compare."""
    old = [
        page
        for page in PAGES
        if renewed(page.read_text(encoding="utf-8")) != page.read_text(encoding="utf-8")
    ]
    if "--check" in sys.argv:
        print(*(f"{page}: its tables are older than the results" for page in old), sep="\n")
        return bool(old)
    for page in old:
        page.write_text(renewed(page.read_text(encoding="utf-8")), encoding="utf-8")
    (ROOT / "docs/pictures").mkdir(exist_ok=True)
    draw()
    return 0


if __name__ == "__main__":
    sys.exit(main())
