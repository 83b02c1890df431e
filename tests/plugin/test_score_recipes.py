"""`mergekit-tspa score`, as a user runs it."""

import json
import re

import pytest
from click.testing import CliRunner

from mergekit_tspa.commands.main import main
from tests.conftest import merge, merged_tensors, recipe, write_lines, write_recipe
from tests.plugin.test_text_recipes import with_texts


def scored(*arguments) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["score", *map(str, arguments), "--quiet"])
    return result.exit_code, result.output


def judged(config, key, files):
    for model, file in zip(config["models"], files):
        model.setdefault("parameters", {})[key] = str(file)
    return config


@pytest.fixture
def held_out(tmp_path):
    """Prompts, which an adapter answers itself, so that it is better than the base there."""
    prompts = [[{"prompt": f"w{i} w{i + by}"} for i in range(1, 7)] for by in (3, 4)]
    return [write_lines(tmp_path / f"{name}.jsonl", rows) for name, rows in zip(("math", "code"), prompts)]


def test_the_report_of_recipes_and_directories(speaking, held_out, tmp_path):
    base, adapters, texts = speaking
    low = write_recipe(tmp_path / "low.yml", judged(recipe("core_tsv", base, adapters), "held_out", held_out))
    guided = write_recipe(tmp_path / "guided.yml", with_texts("regmean", speaking))
    assert merge(recipe("lora_ties", base, adapters), tmp_path / "ties").exit_code == 0
    code, said = scored(low, guided, tmp_path / "ties", "--general", texts[0], "--out", tmp_path / "out")
    assert code == 0, said
    found = json.loads((tmp_path / "out/score.json").read_text())
    assert [row["kind"] for row in found["rows"]] == [
        "base", "single adapters", "plain sum", "recipe", "recipe", "model",
    ]  # fmt: skip
    assert [task["name"] for task in found["tasks"]] == ["math", "code"]
    assert {task["from"] for task in found["tasks"]} == {str(file) for file in held_out}
    assert all(row["error"] is None for row in found["rows"] if "error" in row)
    for row in found["rows"][2:]:
        assert row["retained_mean"].keys() == {"value", "low", "high"} and row["loss"].keys() > {"(general)"}
        assert row["name"].split("/")[-1] in said
    page = (tmp_path / "out/score.html").read_text()
    assert "<img" in page and "http://" not in page.replace("http://www.w3.org", "") and "w4 w5" not in page
    assert (tmp_path / "out/score-retained.png").stat().st_size > 1000
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "score-retained-dark.png", "score-retained.png", "score.html", "score.json",
    ]  # fmt: skip


def test_a_third_of_the_examples_judges_and_never_calibrates(speaking, tmp_path, monkeypatch):
    """What the method reads and what judges are disjoint, and the note says so."""
    from mergekit_tspa.calibration import moments
    from mergekit_tspa.scoring import judge as judging

    _, adapters, _ = speaking
    rows = [{"text": f"w{i} w{i + 1} w{i + 2} w{i + 3}"} for i in range(1, 10)]
    texts = [write_lines(tmp_path / name, rows) for name in ("one.jsonl", "two.jsonl")]
    calibrated, judged_by = [], []
    original = moments.input_statistics

    def heard(singles, given, *args, **options):
        calibrated.append({name: {e.tokens for e in own} for name, own in given.items()})
        return original(singles, given, *args, **options)

    monkeypatch.setattr("mergekit_tspa.calibration.readings.input_statistics", heard)
    init = judging.Judge.__init__

    def kept(self, singles, given, *args, **options):
        judged_by.append({name: {e.tokens for e in own} for name, own in given.items()})
        init(self, singles, given, *args, **options)

    monkeypatch.setattr(judging.Judge, "__init__", kept)
    config = write_recipe(tmp_path / "regmean.yml", with_texts("regmean", speaking, values=texts))
    code, said = scored(config, "--out", tmp_path / "out")
    assert code == 0 and "A third of the examples judges" in said, said
    assert calibrated[0].keys() == judged_by[0].keys() == {str(adapter) for adapter in adapters}
    for name in calibrated[0]:
        assert len(calibrated[0][name]) == 6 and len(judged_by[0][name]) == 3
        assert not calibrated[0][name] & judged_by[0][name]


def test_a_method_that_reads_no_texts_merges_as_if_they_were_not_there(speaking, held_out, tmp_path):
    base, adapters, texts = speaking
    plain = recipe("core_tsv", base, adapters)
    with_both = judged(judged(recipe("core_tsv", base, adapters), "held_out", held_out), "examples", texts)
    got, want = merged_tensors(with_both, tmp_path / "a"), merged_tensors(plain, tmp_path / "b")
    assert all(got[name].equal(want[name]) for name in want)


def test_wrong_input_is_told_before_anything_is_loaded(speaking, held_out, tmp_path):
    base, adapters, _ = speaking
    plain = write_recipe(tmp_path / "plain.yml", recipe("core_tsv", base, adapters))
    fewer = write_recipe(tmp_path / "fewer.yml", recipe("core_tsv", base, adapters[:1]))
    texts = [f"--held-out=math={held_out[0]}", f"--held-out=code={held_out[1]}"]
    one = judged(recipe("core_tsv", base, adapters), "held_out", held_out)
    two = judged(recipe("core_tsv", base, adapters), "held_out", held_out[::-1])
    one, two = (write_recipe(tmp_path / f"{i}.yml", config) for i, config in enumerate((one, two)))
    for arguments, message in [
        ([plain], "math: there are no texts to judge merges by; give held_out"),
        ([plain, fewer, *texts], "it merges other adapters than the first recipe"),
        ([plain, "--held-out=maths=x"], "maths: there is no adapter of this name; did you mean math"),
        ([plain, "--held-out=math"], "is not NAME=FILE"),
        ([plain, *texts, texts[0]], "math is there twice"),
        ([plain, texts[0], "--held-out=code=no.jsonl"], "no.jsonl: there is no such file"),
        ([one, two], "the recipes name different held_out"),
        ([tmp_path], "give at least one recipe"),
        ([tmp_path / "no.yml"], "no.yml"),
        ([plain, *texts, "--out", base], "holds an adapter or a model"),
    ]:
        code, said = scored(*arguments, *([] if "--out" in arguments else ["--out", tmp_path / "out"]))
        assert code and re.search(message, said), said
        assert not (tmp_path / "out/score.json").exists()
    assert scored(one, two, *texts, "--out", tmp_path / "out")[0] == 0


def test_a_merge_that_fails_is_a_row(speaking, held_out, tmp_path):
    base, adapters, _ = speaking
    good = write_recipe(
        tmp_path / "good.yml", judged(recipe("core_tsv", base, adapters), "held_out", held_out)
    )
    start = recipe("distill", base, adapters, parameters={"start": "factor_ties"})
    bad = write_recipe(tmp_path / "bad.yml", judged(start, "examples", held_out))
    code, said = scored(good, bad, "--out", tmp_path / "out")
    assert code == 0 and "bad could not be merged" in said, said
