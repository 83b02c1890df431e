"""The method table as text: what `mergekit-tspa methods` and docs/methods.md show."""

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args, get_origin

from pydantic.fields import FieldInfo

from mergekit_tspa.errors import InputError, nearest
from mergekit_tspa.methods import METHODS
from mergekit_tspa.methods.inputs import OneByOneParameters, Parameters
from mergekit_tspa.methods.method import Method
from mergekit_tspa.methods.rules import RULES, Rule
from mergekit_tspa.methods.spaces import SPACES, Space

_COMMON = {(field.description, field.default) for field in OneByOneParameters.model_fields.values()}


class Section(NamedTuple):
    """One table; cells are Markdown."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    note: str = ""


_NOTE = (
    "Beside these there is `aligned_mean` for full models alone: mergekit's `linear` on models whose hidden "
    "units and heads are brought to the same places first (`weight` 1.0, `normalize` true, `align` "
    "permutation, rotation).\n\n"
    "`weight` is linear where a single adapter of weight 2 brings twice what it brings at weight 1. In a "
    "mean only the "
    "ratios of the weights matter. `factor_` methods multiply `B` and `A` each by the root of the weight. "
    "Beside the updates, in every "
    "method: the magnitudes of DoRA are averaged, with `a_t / max(1, sum |a_t|)`, and so are tensors that "
    "adapters "
    "trained directly, with `a_t / sum |a_t|`, where the weight of a single adapter is without effect.\n\n"
    "The split: an adapter with `B G` and `G^-1 A` makes the same update as one with `B` and `A`, and so "
    "does one that "
    "holds more of its scale in `B`. Methods that depend on it merge the two to different results. Of the "
    "rules in a "
    "space those on entries can, all but sums (`_task_arithmetic`, `_mean`) and spectral rules (`_tsv`, "
    "`_iso`, `_cart`)."
)


def sections() -> list[Section]:
    """Methods of their own, then the rules and the spaces that make the other ones."""
    combined = {f"{space.name}_{rule.name}" for space in SPACES for rule in RULES if space.takes(rule)}
    own = [method for name, method in METHODS.items() if name not in combined]
    return [
        Section(
            "Methods of their own",
            (
                "`merge_method`",
                "what it does",
                "needs",
                "rank of the result",
                "weight",
                "depends on the split",
                "own parameters",
                "paper",
            ),
            [_method_row(method) for method in own],
        ),
        Section(
            "A rule in a space, `<space>_<rule>`: the rules",
            ("rule", "what it does with the updates", "spaces", "weight", "own parameters", "paper"),
            [_rule_row(rule) for rule in RULES],
        ),
        Section(
            "The spaces",
            (
                "space",
                "where the updates are compared",
                "rank of the result",
                "rules on entries depend on the split",
                "own parameters",
                "paper",
            ),
            [_space_row(space) for space in SPACES],
            _NOTE,
        ),
    ]


def markdown() -> str:
    """All sections as Markdown tables."""
    parts = []
    for title, columns, rows, note in sections():
        lines = [f"**{title}**", "", _line(columns), "|" + "---|" * len(columns), *map(_line, rows)]
        parts.append("\n".join(lines))
        parts += [note] if note else []
    return "\n\n".join(parts)


def find(name: str) -> Method:
    """
    Raises:
        InputError: there is none of that name.
    """
    if name not in METHODS:
        near = nearest(name, METHODS, n=3)
        raise InputError(
            f"there is no method {name!r}" + (f"; do you mean {' or '.join(near)}?" if near else "")
        )
    return METHODS[name]


def about(name: str) -> str:
    """One method in full, as Markdown.

    Raises:
        InputError: there is none of that name.
    """
    method = find(name)
    lines = [
        f"**{method.name}**: {method.title}",
        "",
        f"{method.summary}. {_paper(method.paper, method.url)}",
        "",
    ]
    lines += [f"- needs: {_needs(method)}", f"- rank of the result: {method.result.label}"]
    lines += [f"- depends on how an adapter splits its update into `B` and `A`: {method.split}"]
    lines += [f"- `weight` 1.0 (per adapter): weight of the adapter; {method.weight}"]
    lines += [f"- `{name}` {describe(f)}: {f.description}" for name, f in method.parameter_fields().items()]
    return "\n".join(lines)


def parameter_table(names: Sequence[str]) -> str:
    """The own parameters of methods, as a Markdown table; what several mean alike is one row.

    Raises:
        InputError: there is no method of such a name.
    """
    methods: dict[tuple[str, str, str | None], list[str]] = {}
    for name in names:
        for parameter, field in find(name).parameter_fields().items():
            if (field.description, field.default) not in _COMMON:
                methods.setdefault((parameter, describe(field), field.description), []).append(f"`{name}`")
    rows = [
        (f"`{parameter}`", default, meaning, "all" if len(of) == len(names) > 1 else ", ".join(of))
        for (parameter, default, meaning), of in methods.items()
    ]
    columns = ("parameter", "default and range", "meaning", "of")
    shown = len(columns) - (len(names) == 1)
    lines = [_line(row[:shown]) for row in (columns, *rows)]
    return "\n".join([lines[0], "|" + "---|" * shown, *lines[1:]])


def describe(field: FieldInfo) -> str:
    """Default and range of a parameter, such as `0.2 in (0, 1]`."""
    text = "none" if field.default is None else str(field.default).lower()
    if get_origin(field.annotation) is Literal:
        return " or ".join([text, *(str(v) for v in get_args(field.annotation) if v != field.default)])
    limits = {
        key: getattr(b, key) for b in field.metadata for key in ("ge", "gt", "le", "lt") if hasattr(b, key)
    }
    low = f"[{limits['ge']:g}" if "ge" in limits else f"({limits['gt']:g}" if "gt" in limits else None
    high = f"{limits['le']:g}]" if "le" in limits else f"{limits['lt']:g})" if "lt" in limits else None
    if low and high and max(limits.values()) < 1e5:
        return f"{text} in {low}, {high}"
    return f"{text} {'from' if low[0] == '[' else 'above'} {low[1:]}" if low else text


def _method_row(method: Method) -> tuple[str, ...]:
    return (
        f"`{method.name}`",
        method.summary,
        _needs(method),
        method.result.label,
        method.weight,
        method.split,
        _parameters(method.parameters),
        _paper(method.paper, method.url),
    )


def _rule_row(rule: Rule) -> tuple[str, ...]:
    refused = [f"`{space.name}_`" for space in SPACES if not space.takes(rule)]
    whole = METHODS[f"{SPACES[0].name}_{rule.name}"]  # the full space, which has no parameters of its own
    return (
        f"`_{rule.name}`",
        rule.summary,
        f"all but {', '.join(refused)}" if refused else "all",
        rule.weight,
        _parameters(whole.parameters),
        _paper(rule.paper, rule.url),
    )


def _space_row(space: Space) -> tuple[str, ...]:
    fields = _fields(space.parameters)
    fields += [f"`{name}` {default}" for name, default in space.defaults.items()]
    fields += [] if space.scoped else ["no `scope`"]
    return (
        f"`{space.name}_`",
        space.summary,
        space.result.label,
        space.split,
        ", ".join(fields) or "-",
        _paper(space.paper, space.url) if space.paper else "-",
    )


def _needs(method: Method) -> str:
    needs = (
        ("base weights", method.attention),
        ("equal ranks", method.equal_ranks),
        ("texts", method.needs_texts),
        ("texts or statistics of them", bool(method.guided) and not method.needs_texts),
    )
    return ", ".join(what for what, needed in needs if needed) or "-"


def _parameters(parameters: type[Parameters]) -> str:
    return ", ".join(_fields(parameters)) or "-"


def _fields(parameters: type[Parameters]) -> list[str]:
    """Names with defaults and ranges, without those that every method has in the same sense."""
    fields = {n: f for n, f in parameters.model_fields.items() if (f.description, f.default) not in _COMMON}
    return [f"`{f.alias or n}` {describe(f)}" for n, f in fields.items()]


def _paper(paper: str, url: str) -> str:
    return f"[{paper}]({url})" if url else paper


def _line(cells) -> str:
    return f"| {' | '.join(cells)} |"
