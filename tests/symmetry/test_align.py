"""Whole models of every architecture: the aligned one computes the same, and what was planted is undone."""

import json
import re

import pytest
import torch
from click.testing import CliRunner

from mergekit_tspa import InputError
from mergekit_tspa.base.architectures import SYMMETRIES_TESTED
from mergekit_tspa.base.checkpoint import Checkpoint
from mergekit_tspa.commands.main import main
from mergekit_tspa.symmetry.align import AlignedModel
from mergekit_tspa.symmetry.blocks import DEFAULT_KINDS, KINDS, blocks_of, kinds_of
from tests.conftest import load_model, relative_error, save_llama
from tests.plugin.test_architectures import ARCHITECTURES, GROUPED, WIDE, outputs, save_model
from tests.symmetry.planted import opened, plant, save_tensors, tensors_of

# Beside the architectures that are merged: what else `SYMMETRIES_TESTED` names.
MORE = {
    "Gemma": ("GemmaForCausalLM", WIDE),
    "Cohere": ("CohereForCausalLM", GROUPED),
    "GLM": ("GlmForCausalLM", GROUPED | {"head_dim": 8}),
    "Granite": ("GraniteForCausalLM", GROUPED),
    "OLMo 2": ("Olmo2ForCausalLM", GROUPED),
    "Phi": ("PhiForCausalLM", GROUPED | {"partial_rotary_factor": 0.5}),
    "Qwen2-MoE": (
        "Qwen2MoeForCausalLM",
        GROUPED
        | {
            "num_experts": 3,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 20,
            "shared_expert_intermediate_size": 24,
        },
    ),
    "SmolLM3": ("SmolLM3ForCausalLM", GROUPED),
    "StableLM": ("StableLmForCausalLM", GROUPED | {"partial_rotary_factor": 0.5}),
    "StarCoder 2": ("Starcoder2ForCausalLM", GROUPED),
}
TURNED = ("Llama", "Qwen2", "GPT-2", "Phi-3", "Mixtral")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Models of an architecture, made when they are first asked for."""
    folder = tmp_path_factory.mktemp("architectures")

    def model(name):
        path = folder / name
        kind, config = MORE[name] if name in MORE else ARCHITECTURES[name][:2]
        return path if path.exists() else save_model(path, kind, **config)

    return model


def distance(path, other):
    return relative_error(outputs(load_model(path)), outputs(load_model(other)))


@pytest.mark.parametrize("name", [*ARCHITECTURES, *MORE])
def test_an_aligned_model_computes_the_same(name, models, tmp_path):
    """Another model, whose heads look at what they like, aligned with all symmetries; and a planted one, brought back."""
    anchor = models(name)
    draw = torch.Generator().manual_seed(1)
    tensors = {
        key: 2 * W.std() * torch.randn(W.shape, generator=draw) if W.ndim > 1 else W
        for key, W in tensors_of(anchor).items()
    }
    other = save_tensors(anchor, tensors, tmp_path / "other")
    aligned = AlignedModel(opened(other), opened(anchor), KINDS)
    assert len(aligned.blocks) >= 2 * 2
    got = {key: aligned.read(key) for key in aligned.shapes}
    assert distance(save_tensors(anchor, got, tmp_path / "aligned"), other) < 1e-5
    moved = {key for key, W in got.items() if not torch.equal(W, tensors[key])}
    assert moved <= {tensor for block in aligned.blocks for tensor in block.tensors}
    assert moved >= {slot.tensor for block in aligned.blocks for slot in block.slots.get("down", ())}
    assert moved & {slot.tensor for block in aligned.blocks for slot in block.slots.get("v", ())}
    assert sum(a.after for _, a in aligned.known) < sum(a.before for _, a in aligned.known)

    twin = plant(anchor, tmp_path / "twin")
    assert (
        distance(twin, anchor)
        < 1e-5
        < 1e-2
        < max(relative_error(tensors_of(twin)[key], W) for key, W in tensors_of(anchor).items())
    )
    back = AlignedModel(opened(twin), opened(anchor), KINDS)
    for key, W in tensors_of(anchor).items():
        assert relative_error(back.read(key), W) < 1e-5, key


def test_every_type_that_may_be_aligned_is_compared(models):
    configs = [Checkpoint(models(name)).config() for name in (*ARCHITECTURES, *MORE)]
    parts = [
        part
        for config in configs
        for part in (config, config.get("text_config"), config.get("vision_config"))
    ]
    assert {part["model_type"] for part in parts if part} == {*SYMMETRIES_TESTED}


def blend(path, a, b, share=0.5):
    """A model between two others."""
    A, B = tensors_of(a), tensors_of(b)
    return save_tensors(a, {name: torch.lerp(A[name], B[name], share) for name in A}, path)


@pytest.mark.parametrize("name", TURNED)
def test_a_fine_tune_that_was_moved_comes_back(name, models, tmp_path):
    """The mean with the base is far from both before, and as near as that with the fine-tune itself after."""
    base = models(name)
    tuned = plant(base, tmp_path / "tuned", kinds=(), noise=0.02)
    moved = plant(base, tmp_path / "moved", noise=0.02)
    assert distance(moved, tuned) < 1e-5
    result = align(moved, "--to", base, "--out", tmp_path / "back", "--by", "all")
    assert result.exit_code == 0, result.output
    assert {file.name for file in (tmp_path / "back").iterdir()} == {file.name for file in moved.iterdir()}
    assert distance(tmp_path / "back", moved) < 1e-5
    for key, W in tensors_of(tuned).items():
        assert relative_error(tensors_of(tmp_path / "back")[key], W) < 0.03, key
    barriers = [
        distance(blend(tmp_path / f"half {other.name}", base, other), base)
        for other in (tuned, tmp_path / "back", moved)
    ]
    assert barriers[1] < 1.1 * barriers[0] < 0.5 * barriers[2], barriers


@pytest.mark.parametrize("name", [*TURNED, "Qwen3", "T5"])
def test_fine_tunes_of_one_base_have_nothing_to_align(name, models, tmp_path):
    tuned = plant(models(name), tmp_path / "tuned", kinds=(), noise=0.3)
    result = align(tuned, "--to", models(name), "--out", tmp_path / "out", "--by", "all")
    assert "alignment had nothing to do" in result.output
    for key, W in tensors_of(tuned).items():
        assert torch.equal(tensors_of(tmp_path / "out")[key], W)


def align(*arguments):
    return CliRunner().invoke(main, ["align", *map(str, arguments)], env={"COLUMNS": "200"})


def test_only_what_is_asked_for(models, tmp_path):
    base = models("Llama")
    moved = plant(base, tmp_path / "moved", kinds=("permutation",))
    for kinds, left in (("permutation", 0.0), ("rotation", 0.5), ("scale", 0.5)):
        aligned = AlignedModel(opened(moved), opened(base), kinds_of(kinds))
        error = max(relative_error(aligned.read(key), W) for key, W in tensors_of(base).items())
        assert (error > left) if left else (error == 0)
    turned = plant(base, tmp_path / "turned", kinds=("rotation",))
    aligned = AlignedModel(opened(turned), opened(base), ("rotation",))
    assert all(relative_error(aligned.read(key), W) < 1e-5 for key, W in tensors_of(base).items())
    assert not any("mlp" in block.name for block in aligned.blocks)
    with pytest.raises(InputError, match="did you mean rotation"):
        kinds_of("rotations")
    assert kinds_of("all") == KINDS and kinds_of("rotation, permutation") == DEFAULT_KINDS


def test_the_report_says_how_far_it_was(models, tmp_path):
    base = models("Mixtral")
    moved = plant(base, tmp_path / "moved")
    result = align(moved, "--to", base, "--by", "all")
    assert result.exit_code == 0
    rows = [line.split("│")[1:-1] for line in result.output.splitlines() if "│" in line]
    assert [row[0].strip() for row in rows] == [f"model.layers.{i}" for i in (0, 1) for _ in range(2)] or len(
        rows
    ) == 4
    for row in rows:
        assert float(row[2].strip(" %")) < 60 and float(row[3]) > 0.5 > 1e-3 > float(row[4])
    assert "8 of 8 blocks were turned towards" in result.output
    assert not list(tmp_path.glob("*out*"))


def test_shards_and_short_dtypes(tmp_path):
    """A permutation changes no bit of a value; a rotation is rounded once to the model's own dtype."""
    base = save_llama(tmp_path / "base", dtype=torch.bfloat16)
    moved = plant(base, tmp_path / "moved", kinds=("permutation",))
    sharded = tmp_path / "sharded"
    load_model(moved, dtype="auto").save_pretrained(sharded, max_shard_size="20KB")
    result = align(sharded, "--to", base, "--out", tmp_path / "out", "--quiet")
    assert result.exit_code == 0 and not result.output
    got = tensors_of(tmp_path / "out")
    assert all(torch.equal(got[key], W) for key, W in tensors_of(base).items())
    turned = plant(base, tmp_path / "turned", kinds=("rotation",))
    assert align(turned, "--to", base, "--out", tmp_path / "back", "--quiet").exit_code == 0
    for key, W in tensors_of(base).items():
        back = tensors_of(tmp_path / "back")[key]
        assert back.dtype == W.dtype and relative_error(back, W) < 0.02


@pytest.mark.parametrize("transposed", [False, True])
def test_experts_in_one_tensor(transposed, models, tmp_path):
    """Stored as gates and ups of all experts in one tensor, in either orientation."""
    E, f, d = 3, 10, 32
    fused = {}
    for key, W in tensors_of(models("Llama")).items():
        if "mlp" not in key:
            fused[key] = W
    draw = torch.Generator().manual_seed(0)
    for layer in range(2):
        block = f"model.layers.{layer}.mlp.experts"
        up, down = torch.randn(E, 2 * f, d, generator=draw), torch.randn(E, d, f, generator=draw)
        fused[f"{block}.gate_up_proj"] = up.mT.contiguous() if transposed else up
        fused[f"{block}.down_proj"] = down.mT.contiguous() if transposed else down
    base = save_tensors(models("Llama"), fused, tmp_path / "base")
    moved = plant(base, tmp_path / "moved", kinds=("permutation",))
    aligned = AlignedModel(opened(moved), opened(base), ("permutation",))
    assert sum("experts" in block.name for block in aligned.blocks) == 2 * E
    name = "model.layers.1.mlp.experts.down_proj"
    assert not torch.equal(tensors_of(moved)[name], fused[name])
    assert all(torch.equal(aligned.read(key), W) for key, W in fused.items())
    assert torch.equal(aligned.part(f"{name}[1]"), fused[name][1])
    fused["model.layers.0.mlp.experts.gate_up_proj_bias"] = torch.randn(E, 2 * f)
    blocks, notes = blocks_of(opened(save_tensors(models("Llama"), fused, tmp_path / "biased")))
    assert sum("experts" in block.name for block in blocks) == E
    assert any("gate_up_proj_bias of its hidden units is not understood" in note.sentence for note in notes)


def changed(base, out, drop=(), config=None, **tensors):
    """A model with other tensors, without some, and with another configuration."""
    kept = {key: W for key, W in tensors_of(base).items() if not any(part in key for part in drop)}
    path = save_tensors(base, kept | {key.replace("__", "."): W for key, W in tensors.items()}, out)
    if config:
        file = path / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return path


def test_what_has_no_symmetry_is_left_and_named(models, tmp_path):
    base = models("Llama")
    norm = {"model__layers__0__mlp__sub_norm__weight": torch.ones(40)}
    sinks = {"model__layers__0__self_attn__sinks": torch.ones(4)}
    wide = {f"model__layers__{i}__self_attn__q_norm__weight": torch.ones(48) for i in range(2)}
    cases = {
        "sub_norm|weight of its hidden units is not understood": (norm, {}),
        "sinks is not understood": (sinks, {}),
        "a norm goes over all of them": (wide, {}),
        "heads of model_type olmo were never tested": ({}, {"model_type": "olmo"}),
        "its o has shape .* not that of 8 heads": ({}, {"num_attention_heads": 8}),
        "layout of their rotary embedding is not known": ({}, {"model_type": "glm"}),
    }
    for i, (message, (tensors, config)) in enumerate(cases.items()):
        _, notes = blocks_of(opened(changed(base, tmp_path / str(i), config=config, **tensors)))
        assert any(re.search(message, note.sentence) for note in notes), (message, notes)
    # a layer that takes the last tensor of its MLP from another one
    shared = changed(base, tmp_path / "shared", drop=["layers.1.mlp.down_proj"])
    blocks, notes = blocks_of(opened(shared))
    assert not any("mlp" in block.name for block in blocks)
    assert any("layers may share" in note.sentence for note in notes)


def test_models_that_cannot_be_aligned(models, tmp_path):
    base = models("Llama")
    shape = ARCHITECTURES["Llama"].config
    deep = save_model(tmp_path / "deep", "LlamaForCausalLM", **shape | {"num_hidden_layers": 3})
    wide = save_model(tmp_path / "wide", "LlamaForCausalLM", **shape | {"intermediate_size": 44})
    broken = changed(
        base, tmp_path / "nan", model__layers__0__mlp__up_proj__weight=torch.full((40, 32), torch.nan)
    )
    quantised = changed(
        base, tmp_path / "int8", model__layers__0__mlp__up_proj__weight=torch.ones(40, 32).to(torch.int8)
    )
    (tmp_path / "there").mkdir()
    cases = {
        r"9 tensors in layers of .*deep are not in": (deep, base),
        r"up_proj.weight has shape \(44, 32\), but \(40, 32\)|gate_proj|down_proj": (wide, base),
        r"its model_type is mistral": (models("Mistral"), base),
        r"up_proj.weight contains NaN or Inf": (broken, base),
        r"has 2 heads in 2 groups, but 4 heads in 2 groups in": (
            changed(base, tmp_path / "heads", config={"num_attention_heads": 2, "head_dim": 24}),
            base,
        ),
        r"it is quantised \(model.layers.0.mlp.up_proj.weight\)": (quantised, base),
        r"nowhere: there is no such model directory": (tmp_path / "nowhere", base),
        r"give its adapter with --adapter": (f"{base}+{base}", base),
    }
    for message, (model, anchor) in cases.items():
        result = align(model, "--to", anchor, "--out", tmp_path / "out")
        assert result.exit_code == 1 and re.search(message, result.output.splitlines()[-1]), (
            message,
            result.output,
        )
        assert not (tmp_path / "out").exists()
    for options, message in {
        ("--out", tmp_path / "there"): "is there already",
        ("--by", "turns"): "'turns' is no symmetry",
        ("--by", ""): "--by: name a symmetry",
        ("--device", "nowhere"): "cannot be used",
    }.items():
        result = align(base, "--to", base, *options)
        assert result.exit_code == 1 and message in result.output
