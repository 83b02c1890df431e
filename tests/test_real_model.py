"""The example recipes on the real model with the real adapters."""

import json
import os
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file

from mergekit_tspa import merge_adapters
from tests.conftest import ROOT, relative_error, run

MODEL = ROOT / "build/models/SmolLM2-135M-Instruct"
ADAPTERS = [f"examples/adapters/{task}" for task in ("math", "code", "safety", "roleplay")]

RECIPES = sorted(file.stem for file in (ROOT / "yaml_examples").glob("*.yml") if file.stem != "multi")
# The longest of all, each of which has a near relative among the others, or among the commands of the documents.
LONGEST = (
    "regmean",
    "tspa_pairwise",
    "tspa_paper",
    "lora_pcb",
    "lora_emr",
    "knots_ties",
    "factor_ties",
    "lora_dare_ties",
)
RECIPES = [pytest.param(name, marks=pytest.mark.slow) if name in LONGEST else name for name in RECIPES]
# Mean answer loss on held-out examples of the four tasks, 24 each, at most; the base has 1.629.  The examples are not
# part of this project: point MERGEKIT_TSPA_SCORER to a scorer that prints a JSON line with `mean_loss` per model.
SCORER = os.environ.get("MERGEKIT_TSPA_SCORER")
LOSSES = {
    "tspa_lora": 1.36,
    "tspa_attention": 1.43,
    "tspa": 1.46,
    "tspa_paper": 1.46,
    "core_tsv": 1.31,
    "ctm_tsv": 1.325,
}

pytestmark = pytest.mark.skipif(not MODEL.exists(), reason="`make test` builds the model first")


@pytest.fixture(scope="module")
def base():
    return load_file(MODEL / "model.safetensors")


def expected(method: str, weights: list[float], **parameters) -> dict[str, torch.Tensor]:
    """`{tensor name: update}` from the Python entry."""
    updates = merge_adapters(method, ADAPTERS, weights, base=MODEL, **parameters)
    return {f"{module}.weight": update.dense() for module, update in updates.items()}


@pytest.mark.parametrize("name", RECIPES)
def test_recipe(name, base, tmp_path, monkeypatch):
    """The stock command changes exactly the 60 adapted tensors, each by the update the Python entry gives."""
    monkeypatch.chdir(ROOT)
    document = yaml.safe_load((ROOT / f"yaml_examples/{name}.yml").read_text())
    parameters = document.get("parameters", {})
    default = parameters.pop("weight", 1.0)
    texts = [m.get("parameters", {}).get("examples") for m in document["models"]]
    weights = [m.get("parameters", {}).get("weight", default) for m in document["models"]]
    result = run("mergekit-yaml", f"yaml_examples/{name}.yml", tmp_path / "out", "--quiet")
    assert result.returncode == 0, result.stderr
    merged = load_file(tmp_path / "out/model.safetensors")
    assert merged.keys() == base.keys()
    if any(texts):
        parameters["examples"] = texts
    updates = expected(document["merge_method"], weights, **parameters)
    assert len(updates) == 60
    for tensor, W in base.items():
        assert merged[tensor].dtype == W.dtype
        if tensor in updates:
            assert relative_error(merged[tensor], W.float() + updates[tensor]) < 3e-3  # one rounding to bf16
            assert not torch.equal(merged[tensor], W)
        else:
            assert torch.equal(merged[tensor], W)
    if SCORER and name in LOSSES:
        command = [sys.executable, SCORER, "--base", MODEL, "-n", "24", tmp_path / "out"]
        scored = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert json.loads(scored.splitlines()[-1])["mean_loss"] <= LOSSES[name]


def test_multi_recipe(base, tmp_path):
    """Two LoRA merges on the real model feed a stock merge."""
    result = run(
        "mergekit-multi",
        "yaml_examples/multi.yml",
        "-I",
        tmp_path / "parts",
        "--out-path",
        tmp_path / "out",
        "--quiet",
    )
    assert result.returncode == 0, result.stderr
    parts = [load_file(tmp_path / f"parts/{name}/model.safetensors") for name in ("reasoning", "manners")]
    merged = load_file(tmp_path / "out/model.safetensors")
    for tensor in base:
        mean = (parts[0][tensor].float() + parts[1][tensor].float()) / 2
        assert relative_error(merged[tensor], mean) < 6e-3
