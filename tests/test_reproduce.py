"""What `benchmarks/reproduce.py` makes of losses; no model is read here."""

import pytest

from benchmarks.claims import (
    CLAIMS,
    FOUR,
    GIVEN,
    Alike,
    Better,
    Book,
    Claim,
    GrowsLess,
    NotRun,
    NotWorse,
    Outcome,
    Row,
    Tuned,
    Unharmed,
    Within,
    entries,
    loss_difference,
    measured,
    name,
    outcome,
    references,
    row,
    tuned,
    verdict,
)
from benchmarks.readings import READINGS, known
from benchmarks.reproduce import (
    ENOUGH,
    RESULTS,
    anchor,
    cell,
    crossed,
    detailed,
    details,
    load,
    missing,
    pages,
    wanted,
)
from mergekit_tspa import METHODS, merge_adapters
from mergekit_tspa.base.checkpoint import Checkpoint
from mergekit_tspa.scoring.losses import Interval, TextLoss
from tests.conftest import relative_error, save_adapter
from tests.methods.test_tspa import apply, distance

N = 40
GOOD, POOR, SAME = row("r8-qv", "core_tsv"), row("r8-qv", "lora_ties"), row("r8-qv", "lora_pcb")


def texts(loss, step=0.0):
    """Losses of texts of ten tokens, some above and some below the mean."""
    return [[10 * loss + step * (-1) ** i * (1 + i % 3), 10] for i in range(N)]


def losses(loss, tasks=FOUR, step=0.0):
    return {"losses": {task: texts(loss, step) for task in tasks}, "seconds": 2.0, "megabytes": 8.0}


def book(**more):
    """The base has 2 nats a token, single adapters 1."""
    records = {}
    for reference, loss in zip(references(GOOD), (2.0, 1.0)):
        records[reference.key(N)] = losses(loss, (*FOUR, "general", "tool"))
        train = reference._replace(split="train")
        records[train.key(N)] = losses(loss)
    records[GOOD.key(N)] = losses(1.2)
    records[POOR.key(N)] = losses(1.6)
    records[SAME.key(N)] = losses(1.2, step=0.8)
    return Book(records | more, N)


def test_share_and_difference():
    assert book().share(GOOD).value == pytest.approx(0.8)
    assert book().share(Row("r8-qv", "base", split="dev and rest")).value == 0
    assert book().difference(GOOD, POOR).value == pytest.approx(0.4)


@pytest.mark.parametrize(
    "comparison, expected",
    [
        (Better(GOOD, POOR), Outcome.YES),
        (Better(POOR, GOOD), Outcome.NO),
        (Better(GOOD, SAME), Outcome.NONE),
        (Alike(GOOD, SAME), Outcome.YES),
        (Alike(GOOD, POOR), Outcome.NO),
        (NotWorse(GOOD, SAME), Outcome.YES),
        (NotWorse(POOR, GOOD), Outcome.NO),
        (Within((GOOD, SAME), 0.1), Outcome.YES),
        (Within((GOOD, POOR), 0.1), Outcome.NO),
    ],
)
def test_comparisons(comparison, expected):
    assert comparison.outcome(book()) is expected


def test_what_happens_to_the_rest_of_the_texts():
    rest = row("r8-qv", "tspa", split="dev and rest")
    harmed, unharmed = (losses(loss, (*FOUR, "general")) for loss in (2.5, 1.9))
    assert Unharmed(rest, "general").outcome(book(**{rest.key(N): harmed})) is Outcome.NO
    assert Unharmed(rest, "general").outcome(book(**{rest.key(N): unharmed})) is Outcome.YES


def test_growth():
    few, many, more = (row("r8-qv", "tspa", split="time", n=n) for n in (2, 8, 9))
    seconds = {few.key(N): {"seconds": 1.0}, many.key(N): {"seconds": 4.0}, more.key(N): {"seconds": 9.0}}
    assert GrowsLess((few, many), (few, more)).outcome(Book(seconds, N)) is Outcome.YES
    assert GrowsLess((few, more), (few, many)).outcome(Book(seconds, N)) is Outcome.NO


def test_a_difference_inside_its_interval_is_none():
    assert outcome(Interval(0.1, -0.01, 0.2)) is Outcome.NONE
    one, other = ([TextLoss(*text) for text in texts(loss)] for loss in (1.5, 1.2))
    found = loss_difference(one, other)
    assert (found.value, found.low, found.high) == pytest.approx((0.3, 0.3, 0.3))


@pytest.mark.parametrize(
    "outcomes, word",
    [
        ("YES YES", "holds"),
        ("YES NONE", "holds in part"),
        ("YES NO", "holds in part"),
        ("NONE NO", "does not hold"),
    ],
)
def test_one_word(outcomes, word):
    found = {f"comparison {i}": Outcome[kind] for i, kind in enumerate(outcomes.split())}
    assert verdict(found).word == word


def test_what_is_tuned_is_chosen_on_one_split_and_reported_on_the_other():
    best = tuned("r8-qv", "lora_ties", density=[0.1, 0.5])
    first, second = best.candidates
    found = book(**{first.key(N): losses(1.1), second.key(N): losses(1.5)})
    with pytest.raises(NotRun):
        found.share(best)
    assert [*wanted(best, found)] == [first._replace(split="dev")]
    found.records[first._replace(split="dev").key(N)] = losses(1.7)
    assert found.share(best).value == pytest.approx(0.3)
    assert cell(best, found).endswith("density 0.1")
    assert not [*wanted(best, found)]


def test_references_come_before_the_row():
    assert [*wanted(GOOD, Book({}, N))] == [*references(GOOD), GOOD]
    claim = Claim("one", "", "", decided_by=(Better(GOOD, POOR),))
    assert not missing(claim, book())
    assert claim.judged(book()).word == "holds"


def test_a_missing_row_is_no_guess():
    claim = Claim("one", "", "", decided_by=(Better(GOOD, POOR), Better(GOOD, row("r8-qv", "tspa"))))
    found = claim.judged(book())
    assert found.word == "not run" and "1 of 3 rows" in found.sentence and "1 of 1" in found.sentence
    assert cell(row("r8-qv", "tspa"), book()) == "not run" and not details(row("r8-qv", "tspa"), book())


def test_tables_show_what_is_run():
    lines = {"run": {"r8-qv": GOOD}, "not yet": {"r8-qv": row("r8-qv", "tspa")}}
    claim = Claim("one", "", "", table=lines, decided_by=(Better(GOOD, POOR),))
    for table in (crossed, detailed):
        shown = "\n".join(table(claim, book()))
        assert "| run |" in shown and "not yet" not in shown and shown.endswith("\n1 more lines are not run.")


def test_the_page_has_all_claims():
    page = "\n".join(pages(book()))
    for claim in CLAIMS:
        assert f"\n## {claim.name}\n" in page and f"(#{anchor(claim.name)})" in page
    assert "not testable here" in page and "A first look" in page


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.name)
def test_claims_can_be_run(claim):
    """Methods have the parameters, and no two comparisons read the same."""
    assert bool(claim.untestable) != bool(claim.decided_by)
    assert len({str(comparison) for comparison in claim.decided_by}) == len(claim.decided_by)
    methods = METHODS | READINGS
    for entry in claim.entries():
        for own in entry.candidates if isinstance(entry, Tuned) else (entry,):
            if own.method in methods:
                given = {key: value for key, value in own.parameters if key not in ("weight", "n")}
                methods[own.method].bind(given)
            else:
                assert own.method in ("base", "single", "emr of each task")


def test_names():
    assert name(tuned("r8-qv", "svd_cur", k=[0], gamma=[0.5, 1.0])) == "`svd_cur` (k 0, tuned, r8-qv)"
    assert [*entries(Within((GOOD, POOR), 0.1))] == [GOOD, POOR]
    assert measured(GOOD, book()) and not measured(row("r8-qv", "tspa"), book())


def test_no_reading_gives_the_order_of_the_paper():
    """What the page says of them all: LoRA alone would have to be ahead of TIES, both of that, attention of both."""
    (order,) = (claim for claim in CLAIMS if claim.name == "The order of the forms")
    kept = Book(load(RESULTS), ENOUGH)
    for column in GIVEN:
        behind = [order.table["TIES"][column]]
        for form in ("stage 2", "both", "stage 1"):
            rows = [line[column] for label, line in order.table.items() if label.startswith(form)]
            behind = [own for own in rows if any(ahead(own, other, kept) for other in behind)]
        assert not behind, column


def ahead(one, other, book):
    if book.share(one).value <= book.share(other).value:
        return False
    return Better(one, other).outcome(book) is Outcome.YES


STEPS = {"tspa": {"attention_steps": 20, "lora_steps": 20}, "tspa_attention": {"attention_steps": 20}}


@pytest.fixture(scope="module")
def of_attention(llama, tmp_path_factory):
    """Adapters of equal rank: two of all attention, whose scales are free, and one that has one side of each."""
    folder = tmp_path_factory.mktemp("attention")
    whole, half = ["q_proj", "k_proj", "v_proj", "o_proj"], ["q_proj", "v_proj"]
    return [
        save_adapter(llama, folder / str(seed), seed, target_modules=modules)
        for seed, modules in enumerate((whole, whole, half))
    ]


def read(method, llama, adapters, **parameters):
    with known():
        updates = merge_adapters(method, adapters, base=llama, **parameters)
    return {module: update.dense() for module, update in updates.items()}


def apart(one, other):
    return max(relative_error(one[module], other[module]) for module in one)


def test_stage_2_first_is_each_stage_when_the_other_takes_no_steps(llama, of_attention):
    for left_out, alone in (("attention_steps", "tspa_lora"), ("lora_steps", "tspa_attention")):
        steps = STEPS["tspa"] | {left_out: 0}
        (own,) = (name for name in steps if name != left_out)
        found = read("tspa, stage 2 first", llama, of_attention, **steps)
        assert apart(found, read(alone, llama, of_attention, **{own: 20})) < 1e-4


def test_stage_2_first_ends_where_its_objective_says(llama, of_attention):
    """The objective of the factors that stage 2 turned is the distance of the written model."""
    base = dict(Checkpoint(llama))
    singles = [apply(base, merge_adapters("lora_task_arithmetic", [one], base=llama)) for one in of_attention]
    with known():
        updates = merge_adapters("tspa, stage 2 first", of_attention, base=llama, **STEPS["tspa"])
    tau = METHODS["tspa"].parameter_fields()["target_scale"].default
    found = [
        distance(apply(base, updates), base, singles, tau, layer, 4, 2, 16)[report.stage.startswith("value")]
        for report in updates.reports
        if report.stage != "LoRA alignment"
        for layer in range(2)
    ]
    ends = [
        end.item() for report in updates.reports if report.stage != "LoRA alignment" for end in report.end
    ]
    assert len(found) == 4 and ends == pytest.approx(found, rel=1e-3)


@pytest.mark.parametrize("reading", [name for name in READINGS if READINGS[name].attention])
def test_readings_are_not_the_method_itself(reading, llama, of_attention):
    method = reading.split(",")[0]
    steps = STEPS[method] | ({"target_scale": 2.0} if reading == "tspa, stage 1 at the mean" else {})
    usual = read(method, llama, of_attention, **steps)
    assert apart(read(reading, llama, of_attention, **steps), usual) > 1e-4
    assert (
        apart(read(method, llama, of_attention, **steps), usual) == 0
    )  # what the reading changed is as before
