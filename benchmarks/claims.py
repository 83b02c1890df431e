"""What the papers claim, and which merges decide it: a declaration, read by `reproduce.py`.

A *row* is a merge of a set of adapters, read on a split of the texts.  A *comparison* is a pure function from the losses
of some rows to an outcome.  A *claim* is a sentence of a paper, the rows that are shown for it, and the comparisons
that decide whether it holds here.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import combinations, product
from typing import Any, NamedTuple, TypeAlias

import torch

from mergekit_tspa.scoring.losses import Interval, TextLoss, difference, retained

FOUR = ("code", "math", "roleplay", "safety")
FIVE = (*FOUR, "tool")
REST = ("general", "tool")  # what no adapter of a set of four was trained on
TUNING_TEXTS = 16  # of each task, of the train split
SEEDS = (0, 42, 123, 2025, 314159)


class AdapterSet(NamedTuple):
    """Adapters of one kind, one a task."""

    tasks: tuple[str, ...] = FOUR
    training: tuple[str, ...] = ()  # arguments of the trainer; none for the sets that the bench has


def _qkvo(rank: int) -> AdapterSet:
    targets = ("--targets", "q_proj", "k_proj", "v_proj", "o_proj")
    return AdapterSet(training=("--rank", str(rank), "--seed", "42", *targets))


SETS = {
    "r8-qv": AdapterSet(),
    "r8-qv-seeds": AdapterSet(),
    "r32-qv": AdapterSet(),
    "r16-all": AdapterSet(FIVE),
    "r8-qv-dora": AdapterSet(training=("--rank", "8", "--seed", "42", "--dora")),
    **{f"r{rank}-qkvo": _qkvo(rank) for rank in (8, 16, 32)},
    **{f"r8-qv-{seed}": AdapterSet(training=("--rank", "8", "--seed", str(seed))) for seed in SEEDS},
}
GIVEN = tuple(name for name, found in SETS.items() if not found.training)
EIGHT = "r8-qv + r8-qv-seeds"  # for times alone, which need no texts
RANK = {"r8-qv": 8, "r8-qv-seeds": 8, "r32-qv": 32, "r16-all": 16}


class Row(NamedTuple):
    """A merge and the texts that it is read on.

    The methods `base` and `single` are no merges: the base alone, and each adapter alone on its own task.
    `emr of each task` is the model that EMR rebuilds for a task, on the texts of that task.
    """

    set: str
    method: str
    parameters: tuple[tuple[str, Any], ...] = ()  # `weight` among them is one for all adapters
    tasks: tuple[str, ...] = ()  # the adapters that are merged; all of the set, if empty
    split: str = "dev"  # or `dev and rest`, `train`, `time`

    @property
    def merged(self) -> tuple[str, ...]:
        return self.tasks or (SETS[self.set].tasks if self.set in SETS else ())

    def texts(self, n: int) -> int:
        """Of each task."""
        return {"train": TUNING_TEXTS, "time": 0}.get(self.split, n)

    def key(self, n: int) -> str:
        """The base is one row for all sets of the same tasks."""
        base = self.method == "base"
        parameters = ",".join(f"{name}={value}" for name, value in self.parameters)
        tasks = "+".join(self.merged if base else self.tasks)
        return "/".join(
            ["" if base else self.set, self.method, parameters, tasks, self.split, str(self.texts(n))]
        )


class Tuned(NamedTuple):
    """The row that does best on the train split, read on the dev split."""

    candidates: tuple[Row, ...]


Entry: TypeAlias = Row | Tuned


def row(name: str, method: str, tasks: tuple[str, ...] = (), split: str = "dev", **parameters: Any) -> Row:
    """The forms of TSPA aim at the adapters' mean, as the paper's do, if they are not told otherwise."""
    if method.split(",")[0] in ("tspa", "tspa_attention", "tspa_lora"):
        parameters.setdefault("target_scale", 1.0)
    return Row(name, method, tuple(sorted(parameters.items())), tasks, split)


def tuned(name: str, method: str, **grid: Sequence[Any]) -> Tuned:
    """A value of None leaves the parameter at its default."""
    settings = [dict(zip(grid, values)) for values in product(*grid.values())]
    given = [{key: value for key, value in own.items() if value is not None} for own in settings]
    return Tuned(tuple(row(name, method, split="train", **own) for own in given))


class NotRun(LookupError):
    """A row that is not measured yet."""


class Book:
    """What has been measured.

    Args:
        records: by the key of a row: `losses`, per task and text the sum over its tokens and their number, and what else
            was seen
        n: texts of each task
    """

    def __init__(self, records: Mapping[str, Any], n: int):
        self.records, self.n = records, n

    def row(self, entry: Entry) -> Row:
        """The row itself, or the best of those that were tuned over.

        Raises:
            NotRun: one of them is not measured.
        """
        if isinstance(entry, Row):
            return entry
        best = max(entry.candidates, key=lambda own: self.share(own).value)
        return best._replace(split="dev")

    def record(self, entry: Entry) -> Mapping[str, Any]:
        found = self.row(entry)
        for split in (found.split, *(["dev and rest"] if found.split == "dev" else [])):
            if record := self.records.get(found._replace(split=split).key(self.n)):
                return record
        raise NotRun(found.key(self.n))

    def losses(self, entry: Entry) -> dict[str, list[TextLoss]]:
        found = self.record(entry)["losses"]
        return {task: [TextLoss(*text) for text in own] for task, own in found.items()}

    def base(self, entry: Entry) -> dict[str, list[TextLoss]]:
        return self.losses(references(self.row(entry))[0])

    def _gains(self, entry: Entry) -> tuple[dict[str, list[TextLoss]], dict[str, list[TextLoss]]]:
        """Of the base, and of the single adapters that are in the merge."""
        own = self.row(entry)
        base, single = (self.losses(reference) for reference in references(own))
        return base, {task: single[task] for task in own.merged}

    def share(self, entry: Entry) -> Interval:
        """Of the single adapters' gains that a merge keeps, the mean over the tasks."""
        base, single = self._gains(entry)
        return retained(base, single, self.losses(entry)).mean

    def difference(self, one: Entry, other: Entry) -> Interval:
        """By how much more of the gains the one keeps, on the same resampled texts; both of one set."""
        base, single = self._gains(one)
        return difference(base, single, self.losses(one), self.losses(other))


def references(own: Row) -> tuple[Row, Row]:
    """The rows of the base and of the single adapters that shares are told by."""
    split = "train" if own.split == "train" else "dev and rest"
    return Row(own.set, "base", split=split), Row(own.set, "single", split=split.removesuffix(" and rest"))


def loss_difference(one: Sequence[TextLoss], other: Sequence[TextLoss], draws: int = 2000) -> Interval:
    """How much higher the one's loss a token is, in nats, on the same resampled texts."""
    a, b = (torch.tensor(texts, dtype=torch.float64) for texts in (one, other))  # (texts, 2)
    drawn = torch.randint(len(a), (draws, len(a)), generator=torch.Generator().manual_seed(0))
    drawn = torch.cat([torch.arange(len(a))[None], drawn])
    means = [texts[drawn].sum(1) for texts in (a, b)]  # (1 + draws, 2)
    values = means[0][:, 0] / means[0][:, 1] - means[1][:, 0] / means[1][:, 1]
    low, high = values[1:].quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(float(values[0]), low, high)


class Outcome(Enum):
    YES = "as claimed"
    NONE = "no difference"
    NO = "the other way round"


def outcome(found: Interval) -> Outcome:
    """Of a difference that is claimed to be positive; one whose interval holds 0 is none."""
    return Outcome.YES if found.low > 0 else Outcome.NO if found.high < 0 else Outcome.NONE


class Better(NamedTuple):
    """The one keeps more of the single adapters' gains."""

    better: Entry
    worse: Entry

    def outcome(self, book: Book) -> Outcome:
        return outcome(book.difference(self.better, self.worse))

    def __str__(self) -> str:
        return _pair(self.better, "over", self.worse)


class Alike(NamedTuple):
    """They keep the same, as far as the texts tell."""

    one: Entry
    other: Entry

    def outcome(self, book: Book) -> Outcome:
        return _only_if_none(outcome(book.difference(self.one, self.other)))

    def __str__(self) -> str:
        return _pair(self.one, "as", self.other)


class NotWorse(NamedTuple):
    """The one keeps as much or more."""

    one: Entry
    other: Entry

    def outcome(self, book: Book) -> Outcome:
        found = outcome(book.difference(self.one, self.other))
        return Outcome.YES if found is Outcome.NONE else found

    def __str__(self) -> str:
        return _pair(self.one, "not behind", self.other)


class Within(NamedTuple):
    """The shares of all of them, which may be of different sets, lie this close."""

    entries: tuple[Entry, ...]
    limit: float

    def outcome(self, book: Book) -> Outcome:
        shares = [book.share(entry).value for entry in self.entries]
        return Outcome.YES if max(shares) - min(shares) <= self.limit else Outcome.NO

    def __str__(self) -> str:
        return f"{name(self.entries[0])} and its {len(self.entries) - 1} others within {self.limit}"


class Unharmed(NamedTuple):
    """The loss on texts that no adapter was trained on is not above the base's."""

    entry: Entry
    task: str

    def outcome(self, book: Book) -> Outcome:
        found = outcome(loss_difference(book.base(self.entry)[self.task], book.losses(self.entry)[self.task]))
        return Outcome.YES if found is Outcome.NONE else found

    def __str__(self) -> str:
        return f"{name(self.entry)} on {self.task}"


class Quicker(NamedTuple):
    """The one takes fewer seconds."""

    quick: Row
    slow: Row

    def outcome(self, book: Book) -> Outcome:
        quick, slow = (book.record(own)["seconds"] for own in self)
        return Outcome.YES if quick < slow else Outcome.NO

    def __str__(self) -> str:
        return f"{name(self.quick)} quicker than {name(self.slow)}"


class GrowsLess(NamedTuple):
    """From few to many adapters the seconds (or the memory) grow by a smaller factor."""

    less: tuple[Row, Row]
    more: tuple[Row, Row]
    what: str = "seconds"

    def outcome(self, book: Book) -> Outcome:
        less, more = (
            book.record(many)[self.what] / book.record(few)[self.what] for few, many in (self.less, self.more)
        )
        return Outcome.YES if less < more else Outcome.NO

    def __str__(self) -> str:
        return f"{self.what} of {name(self.less[1])} grow less than of {name(self.more[1])}"


Comparison: TypeAlias = Better | Alike | NotWorse | Within | Unharmed | Quicker | GrowsLess


def _only_if_none(found: Outcome) -> Outcome:
    return Outcome.YES if found is Outcome.NONE else Outcome.NO


def name(entry: Entry, where: bool = True) -> str:
    """In sentences; of what is tuned, with the parameters that all candidates share."""
    first = entry if isinstance(entry, Row) else entry.candidates[0]
    others = () if isinstance(entry, Row) else entry.candidates
    fixed = [pair for pair in first.parameters if all(pair in other.parameters for other in others)]
    given = [f"{key} {value}" for key, value in fixed] + (["tuned"] if others else [])
    told = ", ".join([*given, *([_place(entry)] if where else [])])
    return f"`{first.method}` ({told})" if told else f"`{first.method}`"


def _place(entry: Entry) -> str:
    """The set of an entry, and which adapters of it."""
    first = entry if isinstance(entry, Row) else entry.candidates[0]
    return ", ".join(filter(None, (" + ".join(first.tasks), first.set)))


def _pair(one: Entry, word: str, other: Entry) -> str:
    """Two entries that are compared, with their set once if it is the same."""
    if _place(one) != _place(other):
        return f"{name(one)} {word} {name(other)}"
    return f"{name(one, False)} {word} {name(other, False)} on {_place(one)}"


def entries(comparison: Comparison) -> Iterator[Entry]:
    """The rows that a comparison looks at."""
    for part in comparison:
        if isinstance(part, (Row, Tuned)):
            yield part
        elif isinstance(part, tuple):
            yield from (own for own in part if isinstance(own, (Row, Tuned)))


class Verdict(NamedTuple):
    word: str
    sentence: str


def verdict(outcomes: Mapping[str, Outcome]) -> Verdict:
    """One word for all comparisons of a claim, and how many were as claimed."""
    yes, none, no = (
        [text for text, found in outcomes.items() if found is kind]
        for kind in (Outcome.YES, Outcome.NONE, Outcome.NO)
    )
    word = "holds" if len(yes) == len(outcomes) else "holds in part" if yes else "does not hold"
    parts = [f"{len(yes)} of {len(outcomes)} comparisons are as claimed"]
    parts += [f"no difference: {_some(none)}"] if none else []
    parts += [f"the other way round: {_some(no)}"] if no else []
    return Verdict(word, "; ".join(parts) + ".")


def _some(texts: Sequence[str], most: int = 6) -> str:
    return ", ".join(texts[:most]) + (f" and {len(texts) - most} more" if len(texts) > most else "")


@dataclass(frozen=True)
class Claim:
    """
    Args:
        says: what the paper says, in a sentence
        paper: its numbers, a paragraph or a table
        table: `{line: {column: row}}`
        decided_by: the comparisons
        details: shows one row a line with its losses and norms, in place of a column for each set
        untestable: why nothing here can decide it
        note: what is to be known beside the numbers
    """

    name: str
    source: str
    says: str
    paper: str = ""
    table: Mapping[str, Mapping[str, Entry]] = field(default_factory=dict)
    decided_by: tuple[Comparison, ...] = ()
    details: bool = False
    untestable: str = ""
    note: str = ""

    def entries(self) -> list[Entry]:
        """All that has to be measured, each once."""
        shown = [entry for line in self.table.values() for entry in line.values()]
        compared = [entry for comparison in self.decided_by for entry in entries(comparison)]
        return [*dict.fromkeys([*shown, *compared])]

    def judged(self, book: Book) -> Verdict:
        if self.untestable:
            return Verdict("not testable here", self.untestable)
        found, absent = {}, False
        for comparison in self.decided_by:
            try:
                found[str(comparison)] = comparison.outcome(book)
            except NotRun:
                absent = True
        if not absent:
            return verdict(found)
        missing = sum(not measured(entry, book) for entry in self.entries())
        so_far = f" So far {verdict(found).sentence}" if found else ""
        return Verdict("not run", f"{missing} of {len(self.entries())} rows are missing.{so_far}")


def measured(entry: Entry, book: Book) -> bool:
    try:
        book.record(entry)
    except NotRun:
        return False
    return True


# TSPA

LI = "TSPA, Li et al., Findings of ACL 2026"
MODEL = {"scope": "model"}
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "TSPA, attention": ("tspa_attention", {}),
    "TSPA, LoRA": ("tspa_lora", {}),
    "TSPA, both": ("tspa", {}),
}
BASELINES: dict[str, tuple[str, dict[str, Any]]] = {
    "task arithmetic (factor sum)": ("factor_linear", {}),
    "TIES": ("lora_ties", MODEL),
    "DARE + TIES": ("lora_dare_ties", {}),
    "EMR, unified": ("lora_emr", MODEL),
    "PCB": ("lora_pcb", MODEL),
    "KnOTS + TIES": ("knots_ties", MODEL),
}


def _on(where: str, line: str, **more: Any) -> Row:
    method, parameters = (FORMS | BASELINES)[line]
    return row(where, method, **parameters, **more)


def _forms_over_baselines(where: str, **more: Any) -> tuple[Better, ...]:
    return tuple(
        Better(_on(where, "TSPA, both", **more), _on(where, other, **more))
        for other in ("TIES", "DARE + TIES", "PCB", "KnOTS + TIES")
    )


def _table_1() -> Iterator[Claim]:
    where = ("r8-qv", "r8-qv-seeds")

    def own(name: str, line: str) -> Row:
        return _on(name, line, split="dev and rest") if name == "r8-qv" else _on(name, line)

    lines: dict[str, dict[str, Entry]] = {
        "base": {"r8-qv": Row("r8-qv", "base", split="dev and rest")},
        "single adapters": {name: Row(name, "single") for name in where},
        **{line: {name: own(name, line) for name in where} for line in BASELINES | FORMS},
    }
    paper = (
        "Llama-3-8B, average of six benchmarks: base 41.64, task arithmetic 8.00, EMR 20.92, TIES 48.66, DARE + TIES 48.94, "
        "PCB 49.27, TSPA LoRA 49.95, KnOTS + TIES 51.04, TSPA both 52.41, TSPA attention 53.01."
    )
    yield Claim(
        "Table 1, TSPA over its baselines",
        LI,
        "The whole method is ahead of task arithmetic, TIES, DARE + TIES, EMR, PCB and KnOTS + TIES.",
        paper,
        lines,
        tuple(Better(own(name, "TSPA, both"), own(name, line)) for name in where for line in BASELINES),
        details=True,
        note="Both stages end at about the length of the adapters' mean, which is the target of stage 2; what keeps most here is two to "
        "three times as long.",
    )
    yield Claim(
        "Table 1, each stage alone",
        LI,
        "Attention alignment alone is ahead of all baselines; LoRA alignment alone of all but KnOTS + TIES.",
        paper,
        {},
        tuple(
            Better(own(name, form), own(name, line))
            for name in where
            for form in ("TSPA, attention", "TSPA, LoRA")
            for line in BASELINES
            if (form, line) != ("TSPA, LoRA", "KnOTS + TIES")
        ),
    )
    yield Claim(
        "Table 1, the factor sum breaks down",
        LI,
        "Summed factors answer worse than the base.",
        "Average 8.00 against 41.64 of the base.",
        {},
        tuple(
            Better(Row(name, "base", split="dev and rest"), own(name, "task arithmetic (factor sum)"))
            for name in where
        ),
    )
    yield Claim(
        "Table 1, general knowledge",
        LI,
        "The merged models know what the base knows.",
        "MMLU and TriviaQA: base 62.19 and 63.34, TSPA both 62.16 and 62.78, attention 61.99 and 57.82, LoRA 61.29 and 62.86.",
        {},
        tuple(Unharmed(own("r8-qv", form), task) for form in FORMS for task in REST),
        note="The texts are general instructions and tool calls; they are answers, not facts.",
    )


def _figures_and_tables() -> Iterator[Claim]:
    triples = [*combinations(FOUR, 3)]
    lines = [*FORMS, "TIES", "DARE + TIES", "PCB", "KnOTS + TIES"]
    yield Claim(
        "Figure 3, three adapters",
        LI,
        "The whole method is ahead of the baselines for every three of the four adapters.",
        "The figure's numbers are not at hand.",
        {line: {" + ".join(t): _on("r8-qv", line, tasks=t) for t in triples} for line in lines},
        tuple(found for t in triples for found in _forms_over_baselines("r8-qv", tasks=t)),
    )
    ranks = [f"r{rank}-qkvo" for rank in (8, 16, 32)]
    yield Claim(
        "Figure 4a, ranks, and adapters of q, k, v, o",
        LI,
        "The whole method is ahead of the baselines at every rank.",
        "The figure's numbers are not at hand.",
        {line: {name: _on(name, line) for name in ranks} for line in lines},
        tuple(found for name in ranks for found in _forms_over_baselines(name)),
    )

    def at(form: str, weight: float) -> Row:
        more = {} if weight == 1 else {"weight": weight, "coefficients": "paper"}
        return _on("r8-qv", form, **more)

    coefficients = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    yield Claim(
        "Figure 4b, coefficients",
        LI,
        "A coefficient of 1, the paper's choice, is not worse than .5 to .9.",
        "The figure's numbers are not at hand.",
        {form: {str(a): at(form, a) for a in coefficients} for form in FORMS},
        tuple(NotWorse(at(form, 1.0), at(form, a)) for form in FORMS for a in coefficients[:-1]),
        note="The coefficient stands at every factor, as the paper prints it (`coefficients: paper`).",
    )
    lambdas = [round(0.1 * i, 1) for i in range(1, 11)]

    def knots(lambda_: float) -> Row:
        return _on("r8-qv", "KnOTS + TIES", **({} if lambda_ == 1 else {"lambda": lambda_}))

    best = Tuned(tuple(knots(lambda_)._replace(split="train") for lambda_ in lambdas))
    yield Claim(
        "Table 4, weights of KnOTS-TIES",
        LI,
        "KnOTS + TIES is best well below weight 1 and worst at .1; at its best weight it is level with TSPA.",
        "47.34 50.57 52.26 51.66 51.49 50.70 50.52 51.25 50.68 51.04 at .1 to 1.0; TSPA 52.41.",
        {
            "KnOTS + TIES": {str(lambda_): knots(lambda_) for lambda_ in lambdas} | {"tuned": best},
            "TSPA, both": {"1.0": _on("r8-qv", "TSPA, both")},
        },
        (
            Better(knots(0.3), knots(0.1)),
            Better(knots(0.3), knots(1.0)),
            Alike(best, _on("r8-qv", "TSPA, both")),
        ),
        note="The coefficient is `lambda`, as in KnOTS' own code: equal weights cancel in the mean that TIES takes.",
    )
    counts = range(2, 9)

    def time(method: str, n: int, **parameters: Any) -> Row:
        return row(EIGHT, method, split="time", n=n, **parameters)

    timed = ("tspa_attention", "tspa_pairwise", "tspa_lora", "tspa", "knots_ties", "lora_ties")
    yield Claim(
        "Table 5, seconds",
        LI,
        "Attention alignment is quicker than the pairwise original, and grows less with the number of adapters, as does its "
        "memory; KnOTS + TIES is quicker than all forms of TSPA, and rules on entries are quickest.",
        "Minutes for n = 2 to 8: attention 7:19 8:46 10:13 11:36 13:02 14:27 15:55; original 9:24 14:18 19:11 26:05 34:27 and then "
        "out of memory; LoRA 4:02 to 9:26; both 10:38 to 25:30; KnOTS + TIES about 1:45; rules on entries 0:08.",
        {method: {str(n): time(method, n) for n in counts} for method in timed},
        (
            *(Quicker(time("tspa_attention", n), time("tspa_pairwise", n)) for n in (2, 4, 8)),
            *(
                GrowsLess(
                    (time("tspa_attention", 2), time("tspa_attention", 8)),
                    (time("tspa_pairwise", 2), time("tspa_pairwise", 8)),
                    what,
                )
                for what in ("seconds", "megabytes")
            ),
            *(Quicker(time("knots_ties", n), time(form, n)) for n in (2, 8) for form, _ in FORMS.values()),
            *(Quicker(time("lora_ties", n), time("knots_ties", n)) for n in (2, 8)),
        ),
        note="The original is computed through Gram matrices here, in a form whose cost is linear in n. One run each, other work "
        "beside it.",
    )
    seeds = [f"r8-qv-{seed}" for seed in SEEDS]
    yield Claim(
        "Table 6, five seeds",
        LI,
        "The seed matters little: five of them span 6 % of the gain.",
        "52.93 52.41 52.77 53.06 52.91 for seeds 0 42 123 2025 314159; the base has 41.64.",
        {form: {name: _on(name, form) for name in seeds} for form in FORMS},
        (Within(tuple(_on(name, "TSPA, both") for name in seeds), 0.06),),
        note="The seed is that of training.  The merge starts from R = I and needs none, unless two adapters are identical.",
    )
    dora = "r8-qv-dora"
    yield Claim(
        "Table 7, DoRA",
        LI,
        "With DoRA, attention alignment and the whole method are ahead of PCB.",
        "Attention 53.80, both 53.59, PCB 49.64.",
        {line: {dora: _on(dora, line)} for line in lines},
        tuple(Better(_on(dora, form), _on(dora, "PCB")) for form in ("TSPA, attention", "TSPA, both")),
    )
    yield Claim(
        "Absolute scores",
        LI,
        "The scores on MMLU, TriviaQA, IFEval, GSM8K, HumanEval and DirectHarm4.",
        untestable="They belong to an 8B model and its adapters, which are not published; here only the order of methods can be compared.",
    )


# The order of the forms, and readings of the text

READINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "both": ("tspa", {}),
    "stage 1 alone": ("tspa_attention", {}),
    "stage 2 alone": ("tspa_lora", {}),
    "stage 1, R on the model's width": ("tspa_attention", {"align_space": "input"}),
    "both, R on the model's width": ("tspa", {"align_space": "input"}),
    "stage 1, R commutes with RoPE": ("tspa_attention", {"rope_safe": True}),
    "both, R commutes with RoPE": ("tspa", {"rope_safe": True}),
    "both, target after stage 1": ("tspa", {"lora_target": "aligned"}),
    "both, target after stage 1, R on the model's width": (
        "tspa",
        {"lora_target": "aligned", "align_space": "input"},
    ),
    "both, target twice the mean": ("tspa", {"target_scale": 2.0}),
    "stage 1, target twice the mean": ("tspa_attention", {"target_scale": 2.0}),
    "both, target of stage 2 twice the mean": ("tspa, stage 1 at the mean", {"target_scale": 2.0}),
    "both, target of stage 2 four times the mean": ("tspa, stage 1 at the mean", {"target_scale": 4.0}),
    "both, target of stage 2 twice the mean after stage 1": (
        "tspa, stage 1 at the mean",
        {"target_scale": 2.0, "lora_target": "aligned"},
    ),
    "stage 2, target twice the mean": ("tspa_lora", {"target_scale": 2.0}),
    "stage 2, target four times the mean": ("tspa_lora", {"target_scale": 4.0}),
    "both, coefficient .5 in the target too": ("tspa", {"weight": 0.5}),
    "both, coefficient .5 of the update, not in the target": (
        "tspa",
        {"weight": 0.7071, "coefficients": "paper"},
    ),
    "both, averaged factors (coefficient 1/4 of each)": ("tspa", {"weight": 0.25, "coefficients": "paper"}),
    "both, twice the result": ("tspa", {"lambda": 2.0}),
    "stage 1, twice the result": ("tspa_attention", {"lambda": 2.0}),
    "stage 2, twice the result": ("tspa_lora", {"lambda": 2.0}),
    "both, 10 steps of stage 1": ("tspa", {"attention_steps": 10}),
    "stage 1, 10 steps": ("tspa_attention", {"attention_steps": 10}),
    "stage 1, 1000 steps": ("tspa_attention", {"attention_steps": 1000}),
    "stage 1, rate .01": ("tspa_attention", {"attention_lr": 0.01}),
    "stage 2, 100 steps": ("tspa_lora", {"lora_steps": 100}),
    "stage 2, rate .005": ("tspa_lora", {"lora_lr": 0.005}),
    # of readings.py
    "both, scales of stage 1 fixed": ("tspa, scales 1", {}),
    "both, scales of stage 1 free": ("tspa, scales free", {}),
    "stage 1, scales fixed": ("tspa_attention, scales 1", {}),
    "stage 1, scales free": ("tspa_attention, scales free", {}),
    "both, query and key alone": ("tspa, query and key", {}),
    "both, output and value alone": ("tspa, output and value", {}),
    "stage 1, query and key alone": ("tspa_attention, query and key", {}),
    "stage 1, output and value alone": ("tspa_attention, output and value", {}),
    "both, norm of the adapters restored": ("tspa, norm restored", {}),
    "stage 1, norm of the adapters restored": ("tspa_attention, norm restored", {}),
    "stage 1, products summed": ("tspa_attention, products summed", {}),
    "stage 1, products summed, .4 of the result": ("tspa_attention, products summed", {"lambda": 0.4}),
    "both, stage 2 first": ("tspa, stage 2 first", {}),
    "both, scales of stage 2 fixed": ("tspa, scales of stage 2 1", {}),
    "stage 2, scales fixed": ("tspa_lora, scales 1", {}),
    "both, solved in bfloat16": ("tspa, bfloat16", {}),
    "stage 1, solved in bfloat16": ("tspa_attention, bfloat16", {}),
    "both, AMSGrad without momentum": ("tspa, no momentum", {}),
    "stage 1, AMSGrad without momentum": ("tspa_attention, no momentum", {}),
    "both, AMSGrad of short memory": ("tspa, short memory", {}),
    "stage 1, AMSGrad of short memory": ("tspa_attention, short memory", {}),
    "both, a second moment of each entry": ("tspa, second moment of each entry", {}),
    "stage 1, a second moment of each entry": ("tspa_attention, second moment of each entry", {}),
    "stage 2, a second moment of each entry": ("tspa_lora, second moment of each entry", {}),
    "both, one R for both products of a block": ("tspa, one rotation a block", {}),
    "stage 1, one R for both products of a block": ("tspa_attention, one rotation a block", {}),
}
# The same forms, each with the length of its result, or that of its target, that is best on the train split.
LENGTHS = {"lambda": (1.0, 1.5, 2.0, 2.5, 3.0), "target_scale": (1.5, 2.0)}
AT_BEST = {
    "both": "tspa",
    "stage 1 alone": "tspa_attention",
    "stage 2 alone": "tspa_lora",
}


def _order() -> Iterator[Claim]:
    def own(name: str, line: str) -> Row:
        method, parameters = READINGS[line]
        return row(name, method, **parameters)

    yield Claim(
        "The order of the forms",
        LI,
        "Attention alone is ahead of both stages, both of LoRA alone, and LoRA alone of TIES.",
        "53.01, 52.41, 49.95, 48.66.",
        {line: {name: own(name, line) for name in GIVEN} for line in READINGS}
        | {"TIES": {name: _on(name, "TIES") for name in GIVEN}},
        tuple(
            found
            for name in GIVEN
            for found in (
                Better(own(name, "stage 1 alone"), own(name, "both")),
                Better(own(name, "both"), own(name, "stage 2 alone")),
                Better(own(name, "stage 2 alone"), _on(name, "TIES")),
            )
        ),
        details=True,
        note="No reading of attention alone, both and LoRA alone in the table gives the paper's order on any of the sets, in whatever way the "
        "readings are mixed, if what chance explains is no lead. The package's own default is the target of twice the mean. One rotation for each head is "
        "no reading where several heads read one key, because the key would have to turn with each of them.",
    )

    def longer(name: str, form: str, *how: str) -> Tuned:
        rows = [tuned(name, AT_BEST[form], **{key: LENGTHS[key]}).candidates for key in how or LENGTHS]
        return Tuned(tuple(own for found in rows for own in found))

    def reversed_order(name: str) -> Tuned:
        return tuned(name, "tspa, stage 2 first", **{"lambda": LENGTHS["lambda"]})

    yield Claim(
        "The order of the forms, each at its best length",
        LI,
        "What the two stages add is not only a matter of length: with `lambda` or `target_scale` tuned for each form, both are ahead of "
        "either.",
        "The paper has no such comparison; all its forms have `lambda` 1 and the mean as target.",
        {form: {name: longer(name, form) for name in GIVEN} for form in AT_BEST}
        | {
            f"{form}, `lambda` alone": {name: longer(name, form, "lambda") for name in GIVEN}
            for form in AT_BEST
        }
        | {"stage 2 before stage 1, `lambda` alone": {name: reversed_order(name) for name in GIVEN}},
        tuple(
            Better(longer(name, "both"), longer(name, alone))
            for name in GIVEN
            for alone in ("stage 1 alone", "stage 2 alone")
        ),
        note="On adapters of query and value alone the objectives of both stages are distances of the update to one and the same matrix, "
        "the adapters' mean, measured with and without the base's key or output beside it: the better either is solved, the nearer the "
        "result comes to the mean, which is too short, and two stages come nearer than one. With adapters on both sides of a "
        "product the objectives are two.",
    )


# Compress-then-merge, SVD + CUR

LAMBDAS: dict[str, tuple[float, ...]] = {
    "task_arithmetic": (0.25, 0.4, 0.55, 0.7),
    "ties": (1.0, 1.5),
    "dare_ties": (1.0, 1.5),
    "tsv": (0.6, 1.0, 1.4),
    "iso": (1.0, 2.0, 3.0, 4.0),
}
DENSITIES: dict[str, tuple[float, ...]] = {"ties": (0.2, 0.5), "dare_ties": (0.5, 0.8)}
SPACE = {"task_arithmetic": "core", "ties": "lora", "dare_ties": "lora", "tsv": "core", "iso": "core"}


def _grid(rule: str) -> dict[str, tuple[float, ...]]:
    return {"lambda": LAMBDAS[rule]} | ({"density": DENSITIES[rule]} if rule in DENSITIES else {})


def _full(name: str, rule: str) -> Tuned:
    return tuned(name, f"{SPACE[rule]}_{rule}", **_grid(rule))


def _cut(name: str, rule: str) -> Tuned:
    return tuned(name, f"{SPACE[rule]}_{rule}", rank=[RANK[name]], **_grid(rule))


def _ctm(name: str, rule: str) -> Tuned:
    return tuned(name, f"ctm_{rule}", beta=[0.0, 0.5], **_grid(rule))


def _compressed() -> Iterator[Claim]:
    source = "Compress-then-Merge, He et al., ICML 2026"
    rules = [*LAMBDAS]
    kinds = {"compress, then merge": _ctm, "merge, then compress": _cut, "merge alone": _full}
    yield Claim(
        "CtM, before or after",
        source,
        "At equal rank, compressing before the merge is better than after it.",
        "ViT-B/32, 8 tasks, rank 16, normalised accuracy: TIES 65.33 after, 69.75 before; DARE-TIES 65.91, 70.68. Llama-3-8B, 6 "
        "tasks: 93.10, 94.15; 92.88, 95.63.",
        {
            f"{rule}, {kind}": {name: make(name, rule) for name in GIVEN}
            for rule in rules
            for kind, make in kinds.items()
        },
        tuple(Better(_ctm(name, rule), _cut(name, rule)) for name in GIVEN for rule in rules),
        note="`lambda`, `density` and `beta` are tuned on the train split, for each row apart.",
    )
    yield Claim(
        "CtM, the gap to no compression",
        source,
        "What is lost against the uncompressed merge is little; merging first loses more, with Iso most.",
        "Iso-C in Core Space: 75.87, and 65.71 after a cut to rank 16.",
        {},
        (
            *(NotWorse(_ctm(name, rule), _full(name, rule)) for name in GIVEN for rule in rules),
            *(Better(_full(name, "iso"), _cut(name, "iso")) for name in GIVEN),
        ),
    )


def _svd_cur() -> Claim:
    lambdas = (0.4, 1.0, 2.0)

    def both(name: str) -> Tuned:
        shared, combine = ["mean", "sum"], ["residual", "interpolate"]
        return tuned(name, "svd_cur", shared=shared, combine=combine, **{"lambda": lambdas})

    def svd(name: str) -> Tuned:
        return tuned(name, "svd_cur", gamma=[0.0], shared=["mean", "sum"], **{"lambda": lambdas})

    def cur(name: str) -> Tuned:
        return tuned(name, "svd_cur", k=[0], **{"lambda": (0.25, 0.4, 0.7, 1.0)})

    baselines = ("task_arithmetic", "ties", "dare_ties", "tsv")
    return Claim(
        "SVD and CUR, over the halves and the baselines",
        "On the Representation Geometry of LoRA Model Merging, Lu et al., Findings of ACL 2026",
        "What SVD and CUR do together is better than either, and than methods without gradients.",
        "The abstract has no numbers.",
        {
            "both": {name: both(name) for name in GIVEN},
            "SVD alone": {name: svd(name) for name in GIVEN},
            "CUR alone": {name: cur(name) for name in GIVEN},
            **{rule: {name: _full(name, rule) for name in GIVEN} for rule in baselines},
        },
        tuple(
            Better(both(name), other)
            for name in GIVEN
            for other in (svd(name), cur(name), *(_full(name, rule) for rule in baselines))
        ),
        note="The method is reconstructed from the abstract; the verdict is on the reconstruction.",
    )


# The others, a line each


def _ahead(
    title: str,
    source: str,
    says: str,
    paper: str,
    *pairs: tuple[tuple[str, dict], tuple[str, dict]],
    note: str = "",
) -> Claim:
    """A claim that on all given sets the first of each pair, a method and its parameters, is ahead."""
    found = [
        (row(name, better[0], **better[1]), row(name, worse[0], **worse[1]))
        for better, worse in pairs
        for name in GIVEN
    ]
    lines: dict[str, dict[str, Entry]] = {}
    for pair in found:
        for own in pair:
            label = ", ".join([own.method, *(f"{key} {value}" for key, value in own.parameters)])
            lines.setdefault(label, {})[own.set] = own
    return Claim(title, source, says, paper, lines, tuple(Better(*pair) for pair in found), note=note)


TA: tuple[str, dict] = ("lora_task_arithmetic", {})
TIES: tuple[str, dict] = ("lora_ties", MODEL)
KNOTS: tuple[str, dict] = ("knots_ties", MODEL)


def _others() -> Iterator[Claim]:
    yield _ahead(
        "KnOTS",
        "Stoica et al., ICLR 2025",
        "TIES is better in the KnOTS space than on the updates themselves.",
        "",
        (KNOTS, TIES),
    )
    yield _ahead(
        "Core Space",
        "Panariello et al., NeurIPS 2025",
        "TIES is better in Core Space than on the updates and in the KnOTS space.",
        "Llama-3-8B: 21 s in Core Space, 691 s on the updates.",
        (("core_ties", {}), TIES),
        (("core_ties", {}), KNOTS),
    )
    yield _ahead(
        "RobustMerge",
        "Zeng et al., 2025",
        "It is ahead of task arithmetic, TIES and DARE.",
        "MM-MergeBench 57.33 on seen tasks.",
        (("robustmerge", {}), TA),
        (("robustmerge", {}), TIES),
        (("robustmerge", {}), ("lora_dare_ties", {})),
    )
    yield _ahead(
        "TSV",
        "Gargiulo et al., CVPR 2025",
        "It is ahead of task arithmetic and TIES.",
        "ViT-B/32, 8 tasks, full fine-tuning: 85.86.",
        (("core_tsv", {}), TA),
        (("core_tsv", {}), TIES),
    )
    iso = tuple(Better(_full(name, "iso"), _full(name, "task_arithmetic")) for name in GIVEN)
    cts = tuple(tuned(name, "core_iso", common_fraction=[0.8], **_grid("iso")) for name in GIVEN)
    yield Claim(
        "Iso",
        "Marczak et al., ICML 2025",
        "Iso-C is ahead of task arithmetic, and Iso-CTS of Iso-C, each at its own length.",
        "",
        {
            "Iso-C, tuned": {name: _full(name, "iso") for name in GIVEN},
            "Iso-CTS, tuned": dict(zip(GIVEN, cts)),
            "task arithmetic, tuned": {name: _full(name, "task_arithmetic") for name in GIVEN},
        },
        iso + tuple(Better(own, _full(name, "iso")) for name, own in zip(GIVEN, cts)),
    )
    yield _ahead(
        "PCB",
        "Du et al., NeurIPS 2024",
        "It is ahead of task arithmetic and TIES.",
        "",
        (("lora_pcb", MODEL), TA),
        (("lora_pcb", MODEL), TIES),
    )
    yield _ahead(
        "EMR",
        "Huang et al., NeurIPS 2024",
        "The models that masks and scales rebuild are ahead of one merged model by TIES or task arithmetic.",
        "",
        (("emr of each task", {}), TA),
        (("emr of each task", {}), TIES),
    )
    yield _ahead(
        "Pico",
        "2026",
        "It makes task arithmetic, TIES and TSV better.",
        "Llama-3.1-8B, rank 16, q and v: .4093 to .4430, .3859 to .4328, .3473 to .4305.",
        *(
            ((method, {**given, "pico": True}), (method, given))
            for method, given in (TA, TIES, ("core_tsv", {}))
        ),
    )
    yield _ahead(
        "SVC",
        "2026",
        "It makes task arithmetic better.",
        "Full fine-tuning: task arithmetic 68.9 to 81.9, Iso-CTS 81.4 to 85.6.",
        (("lora_task_arithmetic", {"svc": True}), TA),
        note="The paper says so of Iso, too. That is not tried: its singular values are all equal, so it has no directions whose lengths "
        "could be calibrated.",
    )
    yield _ahead(
        "LoRA-LEGO",
        "Zhao et al., 2024",
        "It is ahead of task arithmetic and TIES.",
        "62.9 on ViT, 8 tasks, in a later paper.",
        (("lora_lego", {}), TA),
        (("lora_lego", {}), TIES),
    )


CLAIMS = (*_table_1(), *_figures_and_tables(), *_order(), *_compressed(), _svd_cur(), *_others())
