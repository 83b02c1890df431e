"""Judging merges: the numbers against merges on disk, and a model that is as before."""

import json
import math

import pytest
import torch
from peft import PeftModel

from mergekit_tspa import InputError, merge_adapters, score
from mergekit_tspa.calibration.examples import read_examples
from mergekit_tspa.calibration.readings import part_of
from mergekit_tspa.scoring.exact_match import matches
from mergekit_tspa.scoring.judge import GENERAL
from mergekit_tspa.scoring.losses import TextLoss, difference, loss_interval, mean_loss, retained
from mergekit_tspa.scoring.score_report import BASE, SINGLE
from tests.calibration.conftest import tiny_tokenizer
from tests.conftest import LINES, load_model, merge, recipe, save_adapter, turned, write_lines

GENERAL_LINES = turned(LINES, 3)


def reference_loss(model, file) -> float:
    """Of the answers' tokens, text by text, as a user would measure it."""
    loss = tokens = 0.0
    for example in read_examples(file, tiny_tokenizer(), 128).examples:
        ids = torch.tensor(example.tokens)
        with torch.no_grad():
            logits = model.eval()(ids[None]).logits[0].float()
        start = example.start
        loss += torch.nn.functional.cross_entropy(logits[start - 1 : -1], ids[start:], reduction="sum").item()
        tokens += len(ids) - start
    return loss / tokens


@pytest.fixture(scope="module")
def general(tmp_path_factory):
    return write_lines(tmp_path_factory.mktemp("general") / "general.jsonl", GENERAL_LINES)


def test_losses_are_those_of_models_on_disk(speaking, general, tmp_path):
    """Of the base, of PEFT's single adapters, of a low-rank and a dense merge, and of what lies on disk."""
    base, adapters, texts = speaking
    low = merge_adapters("core_tsv", adapters, base=base)
    dense = merge_adapters("lora_ties", adapters, [0.5, 0.7], base=base)
    low.save_adapter(tmp_path / "adapter")
    for method, weights, out in (("core_tsv", [1, 1], "low"), ("lora_ties", [0.5, 0.7], "dense")):
        result = merge(recipe(method, base, adapters, weights), tmp_path / out)
        assert result.exit_code == 0, result.output
    merges = {"low": low, "dense": dense, "adapter": tmp_path / "adapter", "model": tmp_path / "dense"}
    report = score(base, merges, texts, general)
    rows = {row.name: row for row in report.rows}
    assert [*rows] == [BASE, SINGLE, *merges]
    files = {str(adapter): file for adapter, file in zip(adapters, texts)} | {GENERAL: general}

    def check(row, model):
        for task, file in files.items():
            assert mean_loss(row.judged.losses[task]) == pytest.approx(reference_loss(model, file), rel=1e-4)

    check(rows[BASE], load_model(base))
    for name in ("low", "adapter"):
        check(rows[name], load_model(tmp_path / "low"))
    for name in ("dense", "model"):
        check(rows[name], load_model(tmp_path / "dense"))
    for adapter in adapters:
        alone = PeftModel.from_pretrained(load_model(base), adapter)
        got = mean_loss(rows[SINGLE].judged.losses[str(adapter)])
        assert got == pytest.approx(reference_loss(alone, files[str(adapter)]), rel=1e-4)
    assert rows["low"].rank == 5 and rows["dense"].rank is None
    shown = json.loads(json.dumps(report.as_json()))
    assert [row["name"] for row in shown["rows"]] == [*rows] and "w4 w5" not in json.dumps(shown)


def test_a_model_in_memory_is_as_before(speaking):
    """DoRA, trained norms and dense updates are put in place and taken out again bit for bit."""
    base, adapters, texts = speaking
    model = load_model(base)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    dora = save_adapter(
        base, adapters[0].parent / "dora", seed=3, r=2, use_dora=True, modules_to_save=["norm"]
    )
    merged = merge_adapters("lora_ties", [adapters[0], dora], base=base)
    report = score(model, {"ties": merged}, texts, tokenizer=tiny_tokenizer())
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    out = adapters[0].parent / "dora_merged"
    assert merge(recipe("lora_ties", base, [adapters[0], dora]), out).exit_code == 0
    row = report.rows[-1]
    for adapter, file in zip((adapters[0], dora), texts):
        assert mean_loss(row.judged.losses[str(adapter)]) == pytest.approx(
            reference_loss(load_model(out), file), rel=1e-4
        )


def test_one_adapter_retains_all_and_the_base_nothing(speaking):
    base, adapters, texts = speaking
    merges = {"one": merge_adapters("lora_task_arithmetic", adapters, [1, 0], base=base)}
    report = score(base, merges, texts)
    kept = report.retained(report.rows[-1])
    task = str(adapters[0])
    if task in kept.tasks:
        assert kept.tasks[task].value == pytest.approx(1, abs=1e-3)
        assert retained(report.base, report.single, report.base).tasks[task].value == 0


def test_shares_and_intervals_are_the_formula():
    base = {"a": [TextLoss(20, 10), TextLoss(30, 10)], "b": [TextLoss(9, 3)] * 4, "c": [TextLoss(1, 1)]}
    single = {"a": [TextLoss(10, 10), TextLoss(20, 10)], "b": [TextLoss(3, 3)] * 4, "c": [TextLoss(1, 1)]}
    merged = {"a": [TextLoss(15, 10), TextLoss(20, 10)], "b": [TextLoss(6, 3)] * 4, "c": [TextLoss(2, 1)]}
    kept = retained(base, single, merged)
    assert kept.tasks.keys() == {"a", "b"}, "c has no gain to retain"
    assert kept.tasks["a"].value == pytest.approx(0.75) and kept.tasks["b"].value == pytest.approx(0.5)
    assert kept.mean.value == pytest.approx(0.625) and kept.worst.value == pytest.approx(0.5)
    # Text 0 alone retains .5 and text 1 alone all; every text of b the same.
    assert (kept.tasks["a"].low, kept.tasks["a"].high) == pytest.approx((0.5, 1))
    assert (kept.tasks["b"].low, kept.tasks["b"].high) == pytest.approx((0.5, 0.5))
    more = difference(base, single, merged, base)
    assert more.value == pytest.approx(0.625) and more.low > 0
    assert difference(base, single, merged, merged) == (0, 0, 0)
    assert all(map(math.isnan, difference({"c": base["c"]}, {"c": single["c"]}, merged, base)))
    assert loss_interval(base["b"]) == pytest.approx((3, 3, 3))
    nothing = retained({"c": base["c"]}, {"c": single["c"]}, {"c": merged["c"]})
    assert math.isnan(nothing.mean.value)


@pytest.mark.parametrize(
    "written, answer, right",
    [
        ("so 3 + 4 = 7.", "7", True),
        ("the total is $1,200.00", "1200", True),
        ("7 apples and 8 pears", "7", False),
        ("no number", "7", False),
        ("-3", "3", False),
        ("It is Paris.", "paris", True),
        ("It is Paris, France", "Paris", False),
        ("comparis", "paris", False),
        ("1e3", "1000", True),
        ("12%", "12", True),
        ("", "", False),
    ],
)
def test_answers_are_compared_as_what_they_are(written, answer, right):
    assert matches(written, answer) is right


def test_right_answers_are_counted(speaking, monkeypatch):
    """An adapter that writes what its base writes is as right as that; what is written is the likeliest."""
    base, adapters, _ = speaking
    model, tokenizer = load_model(base), tiny_tokenizer()
    prompt = torch.tensor([read_examples([{"prompt": "w1 w2 w3"}], tokenizer).examples[0].prompt])
    with torch.no_grad():
        likeliest = model.generate(prompt, max_new_tokens=3, do_sample=False)[0, prompt.shape[1] :]
    answer = tokenizer.decode(likeliest, skip_special_tokens=True)
    rows = [{"prompt": "w1 w2 w3", "completion": " w4", "answer": answer}, {"text": "w1 w2 w3"}]
    report = score(base, {"m": merge_adapters("core_tsv", adapters, base=base)}, [rows, rows], new_tokens=3)
    written = report.rows[0].judged.written
    assert all(len(own) == 1 and own[0].tokens <= 3 for own in written.values())
    assert all(own[0].right for own in written.values()) and answer
    assert "right" in report.as_json()["rows"][0]
    silent = score(base, {"m": merge_adapters("core_tsv", adapters, base=base)}, [rows, rows], new_tokens=0)
    assert not silent.rows[0].judged.written


def test_the_part_that_judges_depends_on_the_texts_alone():
    rows = [{"text": f"w{i} w{i + 1} w{i + 2}"} for i in range(10)]
    own = read_examples(rows, tiny_tokenizer()).examples
    judging = part_of(own, "to judge")
    assert len(judging) == 4 and len(part_of(own, "to merge")) == 6
    assert {*judging} | {*part_of(own, "to merge")} == {*own}
    assert {*part_of(own[::-1], "to judge")} == {*judging}
    assert part_of(own, "all") == [*own]
    with pytest.raises(InputError, match="one text cannot be divided"):
        part_of(own[:1], "to judge")


def test_bad_input_is_one_sentence(speaking, tmp_path):
    base, adapters, texts = speaking
    merged = merge_adapters("core_tsv", adapters, base=base)
    other = merge_adapters("core_tsv", adapters[:1], base=base)
    for arguments, message in [
        (({"a": tmp_path}, texts), "no merge of merge_adapters"),
        (({"a": merged, "b": other}, texts), "b: it merges other adapters"),
        (({"a": merged}, texts[:1]), "2 adapters and 1 examples"),
        (({"a": merged, "b": tmp_path}, texts), "holds neither a model"),
        (({"a": merged}, [texts[0], [{"prompt": "w1"}]]), None),  # the adapter answers itself
        (({"a": merged}, [texts[0], None]), "code: there are no texts"),
    ]:
        if message is None:
            assert score(base, *arguments, new_tokens=0).rows
            continue
        with pytest.raises(InputError, match=message):
            score(base, *arguments)
    with pytest.raises(InputError, match="has no tokenizer"):
        score(load_model(base), {"a": merged}, texts)
