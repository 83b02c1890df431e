"""Tiny models and adapters made by transformers and PEFT at test time, and ways to run the stock commands."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from click.testing import CliRunner
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).parent.parent
FIXTURES = Path(__file__).parent / "fixtures"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Workers of pytest-xdist, and the commands that they start, share the cores.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))


def save_llama(path: Path, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides) -> Path:
    """A Llama with grouped-query attention and tied embeddings."""
    torch.manual_seed(seed)
    config = {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    }
    LlamaForCausalLM(LlamaConfig(**(config | overrides))).to(dtype).save_pretrained(path)
    return path


def save_gpt2(path: Path) -> Path:
    """A GPT-2, whose weights are stored transposed."""
    torch.manual_seed(0)
    GPT2LMHeadModel(
        GPT2Config(vocab_size=96, n_positions=32, n_embd=32, n_layer=2, n_head=4)
    ).save_pretrained(path)
    return path


def load_model(path: Path, **options):
    """A model of the class that its configuration names."""
    (kind,) = json.loads((path / "config.json").read_text())["architectures"]
    return getattr(transformers, kind).from_pretrained(path, **options)


def save_adapter(base: Path, path: Path, seed: int = 1, save_embedding_layers="auto", **config) -> Path:
    """A PEFT adapter with random values of all it trains, large enough to matter beside the base weights."""
    torch.manual_seed(seed)
    config = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj"],
        "task_type": "CAUSAL_LM",
    } | config
    model = get_peft_model(load_model(base), LoraConfig(**config))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(path, save_embedding_layers=save_embedding_layers)
    return path


def peft_merged(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """The base with one adapter merged by PEFT itself, as a state dict in float32."""
    model = load_model(base, dtype=torch.float32)
    return PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()


def base_tensors(base: Path) -> dict[str, torch.Tensor]:
    return load_model(base, dtype=torch.float32).state_dict()


@pytest.fixture(scope="session")
def llama(tmp_path_factory) -> Path:
    return save_llama(tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory) -> Path:
    return save_gpt2(tmp_path_factory.mktemp("base") / "gpt2")


@pytest.fixture(scope="session")
def adapters(llama, tmp_path_factory) -> list[Path]:
    """Three adapters of different ranks and modules."""
    folder = tmp_path_factory.mktemp("adapters")
    return [
        save_adapter(llama, folder / "one", seed=1),
        save_adapter(llama, folder / "two", seed=2, r=2, target_modules=["q_proj", "up_proj"]),
        save_adapter(llama, folder / "three", seed=3, r=6, use_rslora=True, target_modules="all-linear"),
    ]


LINES = [
    {"prompt": "w1 w2 w3", "completion": "w4 w5 w6 w7 w8"},
    {"messages": [{"role": "user", "content": "w9 w10"}, {"role": "assistant", "content": "w11 w12 w13"}]},
    {"text": "w14 w15 w16 w17 w18 w19"},
    {"prompt": "w20 w21 w22", "completion": "w23 w24"},
]


def write_lines(path: Path, rows=LINES) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def turned(rows, by: int):
    """The same texts in other words."""
    return json.loads(json.dumps(rows).replace("w1", f"w{by}"))


@pytest.fixture(scope="session")
def speaking(tmp_path_factory):
    """A base with a tokenizer, two adapters, and a file of texts for each."""
    from tests.calibration.conftest import tiny_tokenizer

    folder = tmp_path_factory.mktemp("speaking")
    base = save_llama(folder / "base", max_position_embeddings=128)
    tiny_tokenizer().save_pretrained(base)
    targets = ["q_proj", "v_proj", "down_proj"]
    adapters = [
        save_adapter(base, folder / "math", seed=1, r=3, target_modules=targets),
        save_adapter(base, folder / "code", seed=2, r=2, target_modules=targets[:2]),
    ]
    texts = [write_lines(folder / "math.jsonl"), write_lines(folder / "code.jsonl", turned(LINES, 4))]
    return base, adapters, texts


def recipe(method: str, base: Path | None, adapters: list, weights: list | None = None, **top) -> dict:
    """A recipe that merges adapters, each a path of an adapter of `base`."""
    models = [{"model": {"model": {"path": str(base)}, "lora": {"path": str(a)}}} for a in adapters]
    for model, weight in zip(models, weights or []):
        model["parameters"] = {"weight": weight}
    return {"merge_method": method, "base_model": str(base), "models": models} | top


def write_recipe(path: Path, config: dict | list) -> Path:
    documents = config if isinstance(config, list) else [config]
    path.write_text("---\n".join(yaml.safe_dump(document) for document in documents))
    return path


def run(*command: str | Path, **env: str) -> subprocess.CompletedProcess:
    """Run a console script of this environment as a user would."""
    script = Path(sys.executable).parent / command[0]
    return subprocess.run(
        [str(script), *map(str, command[1:])], capture_output=True, text=True, env=os.environ | env, cwd=ROOT
    )


def merge(config: dict, out: Path, *options: str):
    """Run `mergekit-yaml`'s own click command in this process."""
    from mergekit.scripts.run_yaml import main

    file = write_recipe(out.parent / f"{out.name}.yml", config)
    return CliRunner().invoke(main, [str(file), str(out), "--no-copy-tokenizer", "--quiet", *options])


def merged_tensors(config: dict, out: Path, *options: str) -> dict[str, torch.Tensor]:
    result = merge(config, out, *options)
    assert result.exit_code == 0, result.output + str(result.exception)
    tensors = {}
    for file in out.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30)).item()
