"""The example recipes on the real model with the real adapters."""

import pytest
import torch
import yaml
from safetensors.torch import load_file

from mergekit_tspa import merge_adapters
from tests.conftest import ROOT, relative_error, run

MODEL = ROOT / "build/models/SmolLM2-135M-Instruct"
ADAPTERS = [f"examples/adapters/{task}" for task in ("math", "code", "safety", "roleplay")]

pytestmark = pytest.mark.skipif(not MODEL.exists(), reason="`make test` builds the model first")


@pytest.fixture(scope="module")
def base():
    return load_file(MODEL / "model.safetensors")


def expected(method: str, weights: list[float], **parameters) -> dict[str, torch.Tensor]:
    """`{tensor name: update}` from the Python entry."""
    updates = merge_adapters(method, [ROOT / a for a in ADAPTERS], weights, **parameters)
    return {f"{module}.weight": update.dense() for module, update in updates.items()}


@pytest.mark.parametrize("name", ["lora_task_arithmetic", "factor_linear", "tspa_lora"])
def test_recipe(name, base, tmp_path):
    """The stock command changes exactly the 60 adapted tensors, each by the update the Python entry gives."""
    document = yaml.safe_load((ROOT / f"yaml_examples/{name}.yml").read_text())
    weights = [m.get("parameters", {}).get("weight", 1.0) for m in document["models"]]
    result = run("mergekit-yaml", f"yaml_examples/{name}.yml", tmp_path / "out", "--quiet")
    assert result.returncode == 0, result.stderr
    merged = load_file(tmp_path / "out/model.safetensors")
    assert merged.keys() == base.keys()
    updates = expected(document["merge_method"], weights, **document.get("parameters", {}))
    assert len(updates) == 60
    for tensor, W in base.items():
        assert merged[tensor].dtype == W.dtype
        if tensor in updates:
            assert relative_error(merged[tensor], W.float() + updates[tensor]) < 3e-3  # one rounding to bf16
            assert not torch.equal(merged[tensor], W)
        else:
            assert torch.equal(merged[tensor], W)


def test_multi_recipe(base, tmp_path):
    """Two LoRA merges on the real model feed a stock merge."""
    result = run(
        "mergekit-multi", "yaml_examples/multi.yml", "-I", tmp_path / "parts", "--out-path", tmp_path / "out", "--quiet"
    )
    assert result.returncode == 0, result.stderr
    parts = [load_file(tmp_path / f"parts/{name}/model.safetensors") for name in ("reasoning", "manners")]
    merged = load_file(tmp_path / "out/model.safetensors")
    for tensor in base:
        mean = (parts[0][tensor].float() + parts[1][tensor].float()) / 2
        assert relative_error(merged[tensor], mean) < 6e-3
