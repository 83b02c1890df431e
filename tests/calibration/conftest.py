"""Tiny models, adapters and texts, and what they give when run one adapter at a time by PEFT."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel

from mergekit_tspa.adapters import read_adapter
from mergekit_tspa.base.checkpoint import Checkpoint
from mergekit_tspa.base.tensors import ModelTensors
from mergekit_tspa.calibration.examples import Example
from mergekit_tspa.calibration.singles import Singles
from tests.conftest import load_model, save_adapter

TEMPLATE = (
    "{% for m in messages %}{{ '<s> ' + m['role'] + ' ' + m['content'] + ' </s> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s> assistant ' }}{% endif %}"
)


def tiny_tokenizer(template: str | None = TEMPLATE):
    """Words w0 to w87, roles, and tokens that begin and end a message, 96 in all."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [f"w{i}" for i in range(88)] + ["<s>", "</s>", "system", "user", "assistant", "x", "A", "B"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template=template
    )


def random_texts(names, count: int = 3, seed: int = 0, longest: int = 14) -> dict[str, list[Example]]:
    """Texts of different lengths for each adapter."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    def words(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(0, 96, (n,), generator=generator).tolist())

    return {
        name: [Example(words(draw(1, 6)), words(draw(2, longest - 5))) for _ in range(count)]
        for name in names
    }


def singles_of(base: Path, adapters: list[Path], dtype: torch.dtype = torch.float32) -> Singles:
    """A model in memory with adapters, which are named after their directories."""
    tensors = ModelTensors.of(str(base), Checkpoint(base))
    model = load_model(base, dtype=dtype)
    return Singles(model, tensors, [read_adapter(path, path.name) for path in adapters])


def peft_model(base: Path, adapter: Path) -> PeftModel:
    return PeftModel.from_pretrained(load_model(base, dtype=torch.float32), adapter).eval()


def module_of(model: PeftModel, tensor: str) -> torch.nn.Module:
    """The layer of a PEFT model whose inputs are those of a tensor of the base."""
    return model.get_submodule(f"base_model.model.{tensor.removesuffix('.weight')}")


@pytest.fixture(scope="session")
def gpt2_adapters(gpt2, tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("gpt2_adapters")
    options = {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}
    return [
        save_adapter(gpt2, folder / "four", seed=4, **options),
        save_adapter(gpt2, folder / "five", seed=5, r=3, **(options | {"target_modules": ["c_attn"]})),
    ]


@pytest.fixture(params=["llama", "gpt2"])
def family(request) -> tuple[Path, list[Path]]:
    """A base and adapters of it."""
    if request.param == "llama":
        return request.getfixturevalue("llama"), request.getfixturevalue("adapters")
    return request.getfixturevalue("gpt2"), request.getfixturevalue("gpt2_adapters")
