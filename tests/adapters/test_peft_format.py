"""Reading, with PEFT's own merge as the oracle, and refusing by name."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from mergekit_tspa import InputError, read_adapter
from mergekit_tspa.adapters import Adapter, LoraModule
from mergekit_tspa.base.checkpoint import Checkpoint
from mergekit_tspa.base.names import strip_prefixes
from mergekit_tspa.base.tensors import ModelTensors
from tests.conftest import base_tensors, peft_merged, relative_error, save_adapter

PATTERNS = {"r": 4, "rank_pattern": {"layers.0.self_attn.q_proj": 2}, "alpha_pattern": {"v_proj": 5}}
FLAVOURS = {
    "plain": {},
    "rank and alpha patterns": PATTERNS,
    "rslora": {"use_rslora": True, "r": 8},
    "rslora and patterns": PATTERNS | {"use_rslora": True},
    "all linear": {"target_modules": "all-linear"},
    "some layers": {"layers_to_transform": [1]},
    "regex": {"target_modules": r".*layers\.1\..*(up|down)_proj"},
    "orthogonal": {"init_lora_weights": "orthogonal", "r": 4},
}


def check_against_peft(base, adapter):
    """`W + B A` of every touched tensor equals PEFT's merge, and every other tensor is untouched."""
    before, after = base_tensors(base), peft_merged(base, adapter)
    read = read_adapter(adapter)
    read, tensors = read.fit(
        ModelTensors.of("base", {k: v for k, v in before.items() if k != "lm_head.weight"})
    )
    assert tensors
    for name, W in before.items():
        if name in tensors:
            update = read.factors(tensors[name]).dense()
            assert update.norm() > 0.1 * W.norm()
            assert relative_error(W + update, after[name]) < 1e-6
        else:
            assert torch.equal(W, after[name])


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_equals_peft(flavour, llama, tmp_path):
    check_against_peft(llama, save_adapter(llama, tmp_path / "a", **FLAVOURS[flavour]))


def test_conv1d_is_read_transposed(gpt2, tmp_path):
    adapter = save_adapter(gpt2, tmp_path / "a", target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    check_against_peft(gpt2, adapter)


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("targets", [r".*attn\.c_proj", r".*attn\.c_(proj|attn)|lm_head"])
def test_conv1d_goes_by_the_layer_as_peft_does(flag, targets, tmp_path):
    """PEFT sets the flag per layer when it loads; what it saved belongs to the last layer it looked at."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=96, n_positions=32, n_embd=32, n_layer=2, n_head=4, tie_word_embeddings=False
    )
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    adapter = save_adapter(
        tmp_path / "gpt2", tmp_path / "a", target_modules=targets, save_embedding_layers=False
    )
    edit_config(adapter, fan_in_fan_out=flag)
    before, after = base_tensors(tmp_path / "gpt2"), peft_merged(tmp_path / "gpt2", adapter)
    read, tensors = read_adapter(adapter).fit(ModelTensors.of("base", before, config.to_dict()))
    assert len(tensors) == (2 if "lm_head" not in targets else 5)
    for name, module in tensors.items():
        assert relative_error(before[name] + read.factors(module).dense(), after[name]) < 1e-6


@pytest.mark.parametrize("target", ["q_proj", "v_proj"])  # square, and not
def test_the_flag_is_ignored_on_linear_layers_as_peft_does(target, llama, tmp_path):
    adapter = save_adapter(llama, tmp_path / "a", target_modules=[target])
    edit_config(adapter, fan_in_fan_out=True)
    before, after = base_tensors(llama), peft_merged(llama, adapter)
    base = ModelTensors.of("base", before, Checkpoint(llama).config())
    read, tensors = read_adapter(adapter).fit(base)
    assert len(tensors) == 2
    for name, module in tensors.items():
        assert not read.modules[module].transposed
        assert relative_error(before[name] + read.factors(module).dense(), after[name]) < 1e-6


def test_the_flag_counts_where_the_architecture_does_not_decide():
    """Without a configuration; and an unknown model's own Conv1D layers, if their shapes tell."""
    module = LoraModule(torch.ones(6, 2), torch.ones(2, 4), transposed=True)
    adapter = Adapter("a", None, {"x.h.0.wide": module})
    shapes = {"x.h.0.wide.weight": (4, 6)}
    for config in ({}, {"model_type": "unheard-of"}):
        fitted, _ = adapter.fit(ModelTensors("base", shapes, config))
        assert fitted.modules["x.h.0.wide"].transposed
    with pytest.raises(InputError, match=r"the update of x.h.0.wide has shape \(6, 4\) but .* has \(6, 5\)"):
        adapter.fit(ModelTensors("base", {"x.h.0.wide.weight": (6, 5)}, {"model_type": "llama"}))
    square = Adapter(
        "a", None, {"x.h.0.wide": LoraModule(torch.ones(4, 2), torch.ones(2, 4), transposed=True)}
    )
    assert square.fit(ModelTensors("base", {"x.h.0.wide.weight": (4, 4)}))[0].modules["x.h.0.wide"].transposed


def test_heads_that_are_tied_are_refused():
    adapter = Adapter.from_factors("a", {"lm_head": (torch.ones(9, 2), torch.ones(2, 4))})
    assert adapter.fit(ModelTensors("b", {"lm_head.weight": (9, 4)}, {"tie_word_embeddings": False}))
    with pytest.raises(InputError, match="ties embedding and head"):
        adapter.fit(ModelTensors("b", {"lm_head.weight": (9, 4)}, {"tie_word_embeddings": True}))


@pytest.mark.parametrize("zipped", [True, False])
def test_bin_checkpoints_of_any_age(zipped, tmp_path):
    tensors = {"x.weight": torch.randn(3, 2)}
    torch.save(tensors, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.shapes() == {"x.weight": (3, 2)} and torch.equal(
        checkpoint["x.weight"], tensors["x.weight"]
    )


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_shards(ending, adapters, tmp_path):
    """Of either format, with an index beside them; a shard that is missing is named."""
    sharded = shutil.copytree(adapters[0], tmp_path / "a")
    whole = sharded / "adapter_model.safetensors"
    tensors = sorted(load_file(whole).items())
    whole.unlink()
    files = [f"adapter_model-{i}-of-00002.{ending}" for i in ("00001", "00002")]
    parts = dict(zip(files, (tensors[:3], tensors[3:])))
    for name, part in parts.items():
        (save_file if ending == "safetensors" else torch.save)(dict(part), sharded / name)
    places = {key: name for name, part in parts.items() for key, _ in part}
    (sharded / f"adapter_model.{ending}.index.json").write_text(json.dumps({"weight_map": places}))
    want, got = read_adapter(adapters[0]), read_adapter(sharded)
    assert got.modules.keys() == want.modules.keys()
    for module in want.modules:
        assert all(map(torch.equal, got.factors(module), want.factors(module)))
    (sharded / files[1]).unlink()
    with pytest.raises(InputError, match=rf"{files[1]}: damaged, truncated or missing"):
        read_adapter(sharded)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_model.bin", "adapter_config.json"])
def test_a_pointer_of_git_lfs_is_called_that(name, adapters, tmp_path):
    adapter = shutil.copytree(adapters[0], tmp_path / "a")
    if name == "adapter_model.bin":
        (adapter / "adapter_model.safetensors").unlink()
    (adapter / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(InputError, match=rf"{name}: is a Git LFS pointer, .* run git lfs pull"):
        read_adapter(adapter)


def test_a_base_of_git_lfs_pointers(tmp_path):
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(InputError, match=r"model\.safetensors: is a Git LFS pointer"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_are_computed_in_float32(dtype, llama, tmp_path):
    adapter = save_adapter(llama, tmp_path / "a")
    file = adapter / "adapter_model.safetensors"
    save_file({k: v.to(dtype) for k, v in load_file(file).items()}, file)
    check_against_peft(llama, adapter)


def test_bin_files(llama, tmp_path):
    adapter = save_adapter(llama, tmp_path / "a")
    tensors = load_file(adapter / "adapter_model.safetensors")
    torch.save(tensors, adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    check_against_peft(llama, adapter)


def test_bin_files_run_no_code(llama, tmp_path):
    adapter = save_adapter(llama, tmp_path / "a")
    (adapter / "adapter_model.safetensors").unlink()

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "touched"), "w"))

    torch.save({"base_model.model.x.lora_A.weight": Evil()}, adapter / "adapter_model.bin")
    with pytest.raises(InputError, match="damaged"):
        read_adapter(adapter)
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize(
    "old, new",
    [
        ("base_model.model.", "base_model.model.base_model.model."),
        ("base_model.model.model.", "base_model.model."),  # a module path without its leading `model.`
        ("base_model.model.", "base_model.model._orig_mod."),
        (".lora_A.weight", ".lora_A.default.weight"),
        (".self_attn.", "._fsdp_wrapped_module.self_attn."),
    ],
)
def test_key_prefixes(old, new, llama, tmp_path):
    adapter = save_adapter(llama, tmp_path / "a")
    base = ModelTensors.of("base", base_tensors(llama))
    plain = read_adapter(adapter).fit(base)[1]
    file = adapter / "adapter_model.safetensors"
    renamed = {k.replace(old, new): v for k, v in load_file(file).items()}
    if "lora_A" in old:
        renamed = {k.replace(".lora_B.weight", ".lora_B.default.weight"): v for k, v in renamed.items()}
    assert not renamed.keys() & load_file(file).keys() or "lora_A" in old
    save_file(renamed, file)
    assert read_adapter(adapter).fit(base)[1].keys() == plain.keys()


def test_names():
    assert strip_prefixes("base_model.model._orig_mod.a.b") == "a.b"

    def find(name, *tensors):
        return ModelTensors("b", dict.fromkeys(tensors, (1, 1))).match([name], "a")[name]

    tensors = ["language_model.model.layers.0.q.weight", "vision.layers.0.q.weight", "lm_head.weight"]
    assert find("model.language_model.model.layers.0.q.weight", *tensors) == tensors[0]
    wrapped = ["language_model.model.layers.0.q.weight", "vision_tower.encoder.layers.0.q.weight"]
    assert find("model.language_model.layers.0.q.weight", *wrapped) == wrapped[0]
    with pytest.raises(InputError, match="match no tensor"):  # two candidates: never guess
        find("layers.0.q.weight", *tensors)
    with pytest.raises(InputError, match="nearest name there"):
        find("model.layers.7.q.weight", *tensors)


def edit_config(adapter, **changes):
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


CONFIG_REFUSALS = {
    "LoHa": ({"peft_type": "LOHA"}, "LOHA"),
    "LoKr": ({"peft_type": "LOKR"}, "LOKR"),
    "IA3": ({"peft_type": "IA3"}, "IA3"),
    "VeRA": ({"peft_type": "VERA"}, "VERA"),
    "AdaLoRA": ({"peft_type": "ADALORA"}, "ADALORA"),
    "no type": ({"peft_type": None}, "peft_type is None"),
    "PiSSA niter": (
        {"init_lora_weights": "pissa_niter_4"},
        "pissa_niter_4.*path_initial_model_for_weight_conversion",
    ),
    "LoftQ": ({"init_lora_weights": "loftq"}, "loftq"),
    "CorDA": ({"init_lora_weights": "corda"}, "corda"),
    "LoRA-GA": ({"init_lora_weights": "lora_ga"}, "lora_ga"),
    "KaSA": ({"kasa_config": {"beta": 1e-4}}, "KaSA"),
    "Arrow": ({"arrow_config": {"top_k": 2}}, "Arrow"),
    "DoRA without magnitudes": ({"use_dora": True}, "q_proj has no lora_magnitude_vector, but .* says DoRA"),
    "aLoRA": ({"alora_invocation_tokens": [1, 2]}, "aLoRA"),
    "QALoRA": ({"use_qalora": True}, "QALoRA"),
    "replication": ({"layer_replication": [[0, 2]]}, "layer_replication"),
    "rank": ({"r": 16}, "rank 4 but adapter_config.json says r = 16"),
    "alpha": ({"lora_alpha": "x"}, "lora_alpha"),
    "a number as text": ({"r": "4"}, "r is '4': Input should be a valid integer"),
}


@pytest.mark.parametrize("kind", CONFIG_REFUSALS)
def test_refused_by_configuration(kind, adapters, tmp_path):
    changes, message = CONFIG_REFUSALS[kind]
    adapter = shutil.copytree(adapters[0], tmp_path / "a")
    edit_config(adapter, **changes)
    with pytest.raises(InputError, match=message):
        read_adapter(adapter)


A, B = torch.randn(4, 64), torch.randn(64, 4)
M = "base_model.model.model.layers.0.self_attn.q_proj"
TENSOR_REFUSALS = {
    "DoRA alone": ({f"{M}.lora_magnitude_vector": torch.ones(64)}, "no lora_A"),
    "half an embedding": ({"base_model.model.model.embed_tokens.lora_embedding_A": A}, "no lora_embedding_B"),
    "nothing": ({f"{M}.base_layer.weight": A}, "no LoRA tensors"),
    "tokens": (
        {"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": A},
        r"shape \(4, 64\), but trainable_token_indices.*names 0 tokens",
    ),
    "experts": (
        {"base_model.model.x.experts.lora_A.weight": A, "base_model.model.x.experts.lora_B.weight": B},
        "target_parameters.*names none",
    ),
    "KaSA": ({f"{M}.lora_diag": torch.ones(4)}, "KaSA"),
    "LoKr": ({f"{M}.lokr_w1": A}, "LoKr"),
    "empty saved module": ({"base_model.model.lm_head.weight": torch.ones(0)}, "ZeRO-3"),
    "mlx-lm": ({"model.layers.0.self_attn.q_proj.lora_a": A}, "mlx-lm"),
    "LoHa": ({f"{M}.hada_w1_a": A}, "LoHa"),
    "kohya": ({"lora_unet_q.lora_down.weight": A}, "kohya"),
    "unknown": ({f"{M}.something_new": A}, "no known kind"),
    "half a pair": ({f"{M}.lora_A.weight": A, "base_model.model.x.lora_B.weight": B}, "no lora_B"),
    "ranks": ({f"{M}.lora_A.weight": A[:2], f"{M}.lora_B.weight": B}, "ranks differ"),
    "empty": ({f"{M}.lora_A.weight": A[:, :0], f"{M}.lora_B.weight": B}, "ZeRO-3"),
    "one dimension": ({f"{M}.lora_A.weight": A[0], f"{M}.lora_B.weight": B}, "two dimensions"),
    "integers": ({f"{M}.lora_A.weight": A.to(torch.int8), f"{M}.lora_B.weight": B}, "int8"),
    "NaN": ({f"{M}.lora_A.weight": A, f"{M}.lora_B.weight": B / 0 * 0}, r"q_proj\.lora_B.*NaN"),
    "Inf": ({f"{M}.lora_A.weight": A / 0, f"{M}.lora_B.weight": B}, r"q_proj\.lora_A.*NaN or Inf"),
    "huge": ({f"{M}.lora_A.weight": A.double() * 1e200, f"{M}.lora_B.weight": B}, "beyond float32"),
    "two adapters": ({f"{M}.lora_A.x.weight": A, f"{M}.lora_B.y.weight": B}, "several adapters"),
}


@pytest.mark.parametrize("kind", TENSOR_REFUSALS)
def test_refused_by_tensors(kind, adapters, tmp_path):
    tensors, message = TENSOR_REFUSALS[kind]
    adapter = shutil.copytree(adapters[0], tmp_path / "a")
    save_file({k: v.contiguous() for k, v in tensors.items()}, adapter / "adapter_model.safetensors")
    with pytest.raises(InputError, match=message) as error:
        read_adapter(adapter)
    assert "adapter_model.safetensors" in error.value.message


def test_damaged_files(adapters, tmp_path):
    with pytest.raises(InputError, match="no adapter directory"):
        read_adapter(tmp_path / "nowhere")
    adapter = shutil.copytree(adapters[0], tmp_path / "a")
    file = adapter / "adapter_model.safetensors"
    whole = file.read_bytes()
    for cut in (0, 5, 100, len(whole) - 1):
        file.write_bytes(whole[:cut])
        with pytest.raises(InputError, match=r"adapter_model.safetensors: damaged"):
            read_adapter(adapter)
    file.unlink()
    with pytest.raises(InputError, match=r"no adapter_model.safetensors"):
        read_adapter(adapter)
    (adapter / "adapter_config.json").write_text("{")
    with pytest.raises(InputError, match="not readable as JSON"):
        read_adapter(adapter)
    (adapter / "adapter_config.json").unlink()
    with pytest.raises(InputError, match=r"no adapter_config.json"):
        read_adapter(adapter)


def test_a_file_that_may_not_be_read(adapters, tmp_path, monkeypatch):
    """Of which safetensors says that it is not there; root may read everything, so it is acted here."""
    adapter = shutil.copytree(adapters[0], tmp_path / "a")
    (adapter / "adapter_model.safetensors").write_bytes(b"")

    opened = Path.open

    def refuse(self, *arguments, **options):
        if self.suffix == ".safetensors":
            raise PermissionError(13, "Permission denied")
        return opened(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(InputError, match=r"adapter_model.safetensors: you may not read it"):
        read_adapter(adapter)


def test_shape_of_another_base(adapters):
    adapter = read_adapter(adapters[0])
    shapes = {f"{module}.weight": (63, 64) for module in adapter.modules}
    with pytest.raises(InputError, match=r"shape \(64, 64\).*has \(63, 64\)"):
        adapter.fit(ModelTensors("other", shapes))
