"""`mergekit-tspa tune`, as a user runs it."""

import json
import re

import pytest
import yaml
from click.testing import CliRunner

from mergekit_tspa.commands.main import main
from mergekit_tspa.methods import METHODS
from tests.conftest import LINES, merge, recipe, write_lines, write_recipe
from tests.plugin.test_score_recipes import judged

SOME = "core_tsv lora_ties actmat lora_task_arithmetic ctm_iso tspa_lora factor_ties regmean regmean_plus fisher distill"


@pytest.fixture(autouse=True)
def fewer_methods(request, monkeypatch):
    """The search is the same with eleven methods, and takes seconds."""
    if "every_method" not in request.keywords:
        kept = {name: METHODS[name] for name in SOME.split()}
        monkeypatch.setattr("mergekit_tspa.tuning.tuner.METHODS", kept)


def tuned(*arguments, minutes: float = 0.06) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["tune", *map(str, arguments), "--minutes", str(minutes), "--quiet"])
    return result.exit_code, result.output


@pytest.fixture
def held_out(tmp_path):
    """Prompts, which an adapter answers itself, so that it is better than the base there."""
    prompts = [[{"prompt": f"w{i} w{i + by}"} for i in range(1, 13)] for by in (3, 4)]
    return [write_lines(tmp_path / f"{name}.jsonl", rows) for name, rows in zip(("math", "code"), prompts)]


@pytest.fixture
def config(speaking, held_out, tmp_path):
    base, adapters, _ = speaking
    return write_recipe(
        tmp_path / "recipe.yml", judged(recipe("lora_ties", base, adapters), "held_out", held_out)
    )


def test_a_recipe_that_runs_as_it_stands(config, tmp_path):
    out = tmp_path / "best.yml"
    code, said = tuned(config, "--out", out, "--rank", 3)
    assert code == 0, said
    found = json.loads((tmp_path / "best-report/tune.json").read_text())
    text = out.read_text()
    assert text.startswith("# The best of ") and len(found["sentences"]) >= 3
    written = yaml.safe_load(text)
    best = found["finalists"][0]
    assert written["merge_method"] == best["method"] and written["parameters"]["rank"] == 3
    assert all(
        "weight" in model["parameters"] and "held_out" in model["parameters"] for model in written["models"]
    )
    assert merge(written, tmp_path / "merged").exit_code == 0
    stages = {trial["stage"] for trial in found["trials"]}
    assert stages == {"screen", "search"}
    tried = {trial["method"] for trial in found["trials"]}
    assert tried >= {"core_tsv", "lora_ties", "actmat"} and "regmean" not in tried, "there are no examples"
    assert all(trial["rank"] is None or trial["rank"] <= 3 for trial in found["trials"])
    assert (tmp_path / "best-report/tune-tradeoff.png").stat().st_size > 1000
    assert "<img" in (tmp_path / "best-report/tune.html").read_text()
    for sentence in found["sentences"]:
        assert " ".join(sentence.split()) in " ".join(said.split())


def test_a_killed_search_goes_on_where_it_was(config, tmp_path, monkeypatch):
    """The trials are on disk one by one: after a kill none is run again, and their time counts."""
    from mergekit_tspa.tuning import workbench

    original, ran = workbench.Workbench.run, []

    def run(self, job):
        if len(ran) == 4:
            raise SystemExit(9)  # as a kill ends it: nothing is written any more
        ran.append(job)
        return original(self, job)

    monkeypatch.setattr(workbench.Workbench, "run", run)
    out = tmp_path / "best.yml"
    assert tuned(config, "--out", out)[0] == 9 and not out.exists()
    trials = (tmp_path / "best.trials").stat().st_size
    assert trials > 0
    ran_before = list(ran)
    monkeypatch.setattr(workbench.Workbench, "run", lambda self, job: ran.append(job) or original(self, job))
    code, said = tuned(config, "--out", out, minutes=0.1)
    assert code == 0, said
    assert not any(job in ran_before for job in ran[4:])
    found = json.loads((tmp_path / "best-report/tune.json").read_text())
    screened = [(t["method"], str(t["parameters"])) for t in found["trials"] if t["stage"] == "screen"]
    assert len(screened) == len(set(screened)) == 7
    assert (tmp_path / "best.trials").stat().st_size > trials
    # Without time left it only judges again what it has.
    again = len(ran)
    assert tuned(config, "--out", out, minutes=0.1)[0] == 0
    assert len(ran) <= again + 3


def test_ctrl_c_writes_the_best_so_far(config, tmp_path, monkeypatch):
    from mergekit_tspa.tuning import workbench

    original, ran = workbench.Workbench.run, []

    def run(self, job):
        ran.append(job.spec)
        if len(ran) == 5:
            raise KeyboardInterrupt
        return original(self, job)

    monkeypatch.setattr(workbench.Workbench, "run", run)
    code, said = tuned(config, "--out", tmp_path / "best.yml", minutes=5)
    assert code == 0, said
    found = json.loads((tmp_path / "best-report/tune.json").read_text())
    assert (
        len(found["trials"]) == 4
        and merge(yaml.safe_load((tmp_path / "best.yml").read_text()), tmp_path / "m").exit_code == 0
    )


def test_examples_let_methods_read_and_train(speaking, held_out, tmp_path):
    base, adapters, texts = speaking
    given = judged(judged(recipe("core_tsv", base, adapters), "held_out", held_out), "examples", texts)
    config = write_recipe(tmp_path / "with.yml", given)
    code, said = tuned(config, "--out", tmp_path / "best.yml", "--general", texts[0], minutes=0.2)
    assert code == 0, said
    found = json.loads((tmp_path / "best-report/tune.json").read_text())
    assert {"regmean", "regmean_plus", "fisher"} <= {trial["method"] for trial in found["trials"]}
    (finish,) = [trial for trial in found["trials"] if trial["stage"] == "finish"]
    assert finish["method"] == "distill" and finish["rank"] == 3 and finish["parameters"]["steps"] >= 16
    assert "on general texts its loss is" in said


def test_limits_are_kept(config, speaking, tmp_path):
    """With a limit that only some merges meet, the result meets it."""
    _, _, texts = speaking
    options = ["--general", texts[0], "--out", tmp_path / "best.yml"]
    code, said = tuned(config, *options)
    assert code == 0, said
    limit = float(re.search(r"on general texts its loss is [\d.]+, the base's ([\d.]+\d)", said).group(1))
    code, said = tuned(config, *options, "--general-loss-at-most", limit)
    assert code and "trials of another search" in said
    options += ["--storage", tmp_path / "other.trials", "--general-loss-at-most", limit, "--goal", "worst"]
    code, said = tuned(config, *options)
    if code == 0:
        found = json.loads((tmp_path / "best-report/tune.json").read_text())
        assert all(finalist["within_limits"] for finalist in found["finalists"]) and found["goal"] == "worst"
    else:
        assert "no merge was found" in said


def test_wrong_input(config, speaking, held_out, tmp_path):
    base, adapters, _ = speaking
    plain = write_recipe(tmp_path / "plain.yml", recipe("core_tsv", base, adapters))
    sliced = recipe("core_tsv", base, adapters)
    models = sliced.pop("models")
    sliced["slices"] = [{"sources": [model | {"layer_range": [0, 2]} for model in models]}]
    sliced = write_recipe(tmp_path / "sliced.yml", sliced)
    one_text = write_lines(tmp_path / "one.jsonl", LINES[:1])
    (tmp_path / "broken.trials").write_text("no journal")
    for arguments, message in [
        ([plain, "--out", tmp_path / "a.yml"], "there are no texts to judge merges by"),
        ([sliced, "--out", tmp_path / "a.yml"], "a search needs a recipe with `models:`"),
        ([config, "--out", tmp_path / "a.txt"], "name the recipe that is to be written"),
        ([config, "--out", config], "it is the recipe that the search begins with"),
        ([config, "--out", tmp_path / "a.yml", "--general-loss-at-most", 1], "needs such texts"),
        ([config, "--out", tmp_path / "broken.yml"], "holds no trials of a search"),
        (
            [config, "--out", tmp_path / "a.yml", "--held-out", f"math={one_text}"],
            "it has one text to judge by",
        ),
        ([config, "--out", tmp_path / "a.yml", "--ray", "127.0.0.1:1"], "no Ray cluster answers"),
    ]:
        code, said = tuned(*arguments)
        assert code == 1 and re.search(message, said), said
        assert not (tmp_path / "a.yml").exists()
