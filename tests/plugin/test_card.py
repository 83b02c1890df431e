"""The model card beside what mergekit writes itself."""

import pytest
import yaml
from mergekit.config import MergeConfiguration

from mergekit_tspa.plugin.card import model_card
from tests.conftest import merge, save_llama
from tests.symmetry.planted import plant


def test_repositories_are_linked_and_directories_are_not(tmp_path, monkeypatch):
    """A local `adapters/math` is spelled like a repository; mergekit's own card would ask the hub about it."""
    (tmp_path / "adapters/math").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    recipe = {
        "merge_method": "knots_ties",
        "base_model": "some/base",
        "models": [
            {"model": "some/base+adapters/math", "parameters": {"weight": 0.5}},
            {
                "model": "some/base+other/code@v2",
                "parameters": {"weight": [{"filter": "mlp", "value": [0, 0.3]}]},
            },
            {"model": "some/tuned"},
            {"model": "some/base"},
        ],
    }
    card = model_card(MergeConfiguration.model_validate(recipe), "the recipe", "out")
    head = yaml.safe_load(card.split("---")[1])
    assert head["base_model"] == ["some/base", "other/code", "some/tuned"]
    for row in (
        "| adapters/math | 0.5 |",
        "| [other/code@v2](https://huggingface.co/other/code) | 0 to 0.3 |",
        "| [some/tuned](https://huggingface.co/some/tuned) | 1 |",
    ):
        assert row in card
    assert "\n\n| input | weight |\n" in card and "the recipe" in card
    assert "Stoica et al., 2024" in card and "https://arxiv.org/abs/2410.19735" in card
    assert (
        card.count("| [some/base]") == 0
        and "using [some/base](https://huggingface.co/some/base) as a base" in card
    )


def test_a_mean_of_models_in_directories_beside(tmp_path, monkeypatch):
    """mergekit's own card asks the hub about `tuned`, once the merge is written."""
    base = save_llama(tmp_path / "base")
    plant(base, tmp_path / "tuned", kinds=(), noise=0.1)
    monkeypatch.chdir(tmp_path)
    models = [{"model": "base", "parameters": {"weight": 0.25}}, {"model": "tuned"}]
    config = {"merge_method": "aligned_mean", "base_model": "base", "models": models}
    monkeypatch.setattr("huggingface_hub.repo_exists", lambda *_, **__: pytest.fail("asks the hub"))
    result = merge(config, tmp_path / "out")
    assert result.exit_code == 0, result.output
    card = (tmp_path / "out/README.md").read_text()
    assert "| base | 0.25 |" in card and "| tuned | 1 |" in card and "using base as a base" in card
    assert "[Mean of aligned models](https://arxiv.org/abs/2209.04836)" in card
    assert (tmp_path / "out/mergekit_config.yml").exists()
