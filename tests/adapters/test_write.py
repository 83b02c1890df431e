"""An adapter that is written update by update has the bytes that safetensors would write of it whole."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergekit_tspa import InputError, LoraFactors
from mergekit_tspa.adapters.modules import LoraModule
from mergekit_tspa.adapters.write import AdapterWriter


def draw(d_out, r, d_in, seed):
    g = torch.Generator().manual_seed(seed)
    return LoraFactors(torch.randn(d_out, r, generator=g), torch.randn(r, d_in, generator=g))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_file_is_that_of_safetensors(tmp_path, dtype):
    updates = {"z.q": draw(6, 2, 4, 0), "a.down": draw(5, 3, 7, 1), "embed": draw(9, 1, 4, 2)}
    upright = LoraModule(torch.ones(1, 1), torch.ones(1, 1))
    modules = {"z.q": upright, "a.down": upright._replace(transposed=True)}
    modules["embed"] = upright._replace(transposed=True, embedding=True)
    writer = AdapterWriter(tmp_path / "new" / "adapter", modules, dtype)
    assert not (tmp_path / "new").exists()  # nothing is made before there is something to write
    for name, update in updates.items():
        writer.add(name, update)
    config = writer.finish("base", "CAUSAL_LM")

    whole = {}
    for name, update in updates.items():
        B, A = update.padded(3).to(dtype)
        B, A = (A.mT, B.mT) if modules[name].transposed else (B, A)
        kind = "lora_embedding_{}" if modules[name].embedding else "lora_{}.weight"
        for side, factor in (("B", B), ("A", A)):
            whole[f"base_model.model.{name}.{kind.format(side)}"] = factor.contiguous()
    save_file(whole, tmp_path / "whole.safetensors", metadata={"format": "pt"})
    written = tmp_path / "new" / "adapter" / "adapter_model.safetensors"
    assert written.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert {key: tuple(tensor.shape) for key, tensor in load_file(written).items()} == {
        key: tuple(tensor.shape) for key, tensor in whole.items()
    }
    assert config["r"] == config["lora_alpha"] == 3 and config["target_modules"] == ["down", "embed", "q"]
    assert {file.name for file in written.parent.iterdir()} == {written.name, "adapter_config.json"}


def test_values_that_the_dtype_does_not_hold_leave_nothing_behind(tmp_path):
    writer = AdapterWriter(tmp_path, {"m": LoraModule(torch.ones(1, 1), torch.ones(1, 1))}, torch.float16)
    with pytest.raises(InputError, match="too large for torch"):
        writer.add("m", LoraFactors(torch.full((2, 1), 1e6), torch.ones(1, 2)))
    assert not [*tmp_path.iterdir()]
