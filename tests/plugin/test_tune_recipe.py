"""`mergekit-tspa tune`, as a user runs it."""

import json
import re

import pytest
import yaml
from click.testing import CliRunner

from mergekit_tspa.commands.main import main
from tests.conftest import merge, recipe, write_lines, write_recipe
from tests.plugin.test_score_recipes import judged


def tuned(*arguments, minutes: float = 0.1) -> tuple[int, str]:
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
