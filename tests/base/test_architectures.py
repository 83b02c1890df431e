"""The table of architectures: a row is all that a new one needs."""

import pytest
import torch

from mergekit_tspa.adapters import Adapter
from mergekit_tspa.base import architectures
from mergekit_tspa.base.architectures import ARCHITECTURES, Architecture, architecture_of, part_of
from mergekit_tspa.base.files import replaced
from mergekit_tspa.base.geometry import AttentionGeometry, attention_blocks, attention_role, in_attention
from mergekit_tspa.base.tensors import ModelTensors

CONFIG = {"model_type": "somemodel", "heads": 3, "hidden_size": 12, "rope_theta": 1e4}


def test_one_row_per_model_type():
    types = [row.model_type for row in ARCHITECTURES]
    assert len(types) == len({*types})
    assert architecture_of({"model_type": ["no", "name"]}) == architecture_of({}) == Architecture("")


def test_an_architecture_is_one_row(monkeypatch):
    row = Architecture(
        "somemodel", fused="per head", conv1d=("wide",), interleaved_rope=True, n_heads=("heads",)
    )
    monkeypatch.setattr(architectures, "ARCHITECTURES", (*ARCHITECTURES, row))
    geometry = AttentionGeometry.from_config(CONFIG)
    assert geometry == (3, 3, 4, None, "per head", True)
    assert geometry.rows("k").tolist() == [4, 5, 6, 7, 16, 17, 18, 19, 28, 29, 30, 31]

    adapter = Adapter.from_factors(
        "a", {name: (torch.ones(6, 2), torch.ones(2, 4)) for name in ("x.wide", "x.other")}
    )
    shapes = {"x.wide.weight": (4, 6), "x.other.weight": (6, 4)}
    fitted, _ = adapter.fit(ModelTensors("base", shapes, CONFIG))
    assert fitted.factors("x.wide").dense().shape == (4, 6) and fitted.factors("x.other").dense().shape == (
        6,
        4,
    )


@pytest.mark.parametrize(
    "config, geometry",
    [
        ({"num_attention_heads": 4, "hidden_size": 32}, (4, 4, 8, 0, None, False)),
        (
            {"num_attention_heads": 4, "hidden_size": 32, "head_dim": 6, "num_key_value_heads": 2},
            (4, 2, 6, 0, None, False),
        ),
        ({"model_type": "gpt2", "n_head": 4, "n_embd": 32}, (4, 4, 8, 0, "stacked", True)),
        ({"model_type": "t5", "num_heads": 4, "d_model": 32, "d_kv": 12}, (4, 4, 12, 0, None, False)),
        (
            {"model_type": "gpt_neox", "num_attention_heads": 4, "hidden_size": 32, "rotary_pct": 0.25},
            (4, 4, 8, 2, "per head", False),
        ),
        (
            {"num_attention_heads": 4, "hidden_size": 32, "rope_parameters": {"partial_rotary_factor": 0.5}},
            (4, 4, 8, 4, None, False),
        ),
        ({"model_type": "gptj", "n_head": 4, "n_embd": 32, "rotary_dim": 4}, (4, 4, 8, None, None, False)),
        ({"model_type": "codegen", "n_head": 4, "n_embd": 32}, (4, 4, 8, None, None, False)),
        ({"num_attention_heads": 4, "hidden_size": 32, "rotary_dim": 4}, (4, 4, 8, 4, None, False)),
        (
            {"text_config": {"num_attention_heads": 2, "hidden_size": 8, "rope_theta": 1}},
            (2, 2, 4, 4, None, False),
        ),
    ],
)
def test_geometry_comes_from_the_configuration(config, geometry):
    assert AttentionGeometry.from_config(config) == geometry


def test_blocks_of_a_vision_tower_have_their_own_configuration():
    config = {"text_config": {"x": 1}, "vision_config": {"x": 2}}
    assert part_of(config) == part_of(config, "model.layers.0.self_attn") == {"x": 1}
    assert part_of(config, "vision_tower.layers.0.self_attn") == part_of(config, "visual.attn") == {"x": 2}
    assert part_of({"x": 3}, "vision_tower") == {"x": 3}


def test_roles_go_by_name():
    names = {
        "model.layers.0.self_attn.q_proj.weight": ("model.layers.0.self_attn", "q"),
        "encoder.layer.1.attention.self.key.weight": ("encoder.layer.1.attention", "k"),
        "encoder.layer.1.attention.output.dense.weight": ("encoder.layer.1.attention", "o"),
        "decoder.block.0.layer.1.EncDecAttention.v.weight": ("decoder.block.0.layer.1.EncDecAttention", "v"),
        "h.0.attn.c_attn.weight": ("h.0.attn", "qkv"),
        "h.0.mlp.c_proj.weight": None,
        "h.0.attn.c_attn.bias": None,
    }
    assert {name: attention_role(name) for name in names} == names
    assert attention_blocks(names)["encoder.layer.1.attention"].keys() == {"k", "o"}
    assert in_attention("vision.head.attention.in_proj_weight") and not in_attention("h.0.mlp.c_proj.weight")


def test_a_file_takes_its_name_when_it_is_whole(tmp_path):
    file = tmp_path / "page"
    file.write_text("old")
    with pytest.raises(ZeroDivisionError), replaced(file) as partial:
        partial.write_text("half of the n")
        1 / 0  # noqa: B018
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]
    with replaced(file) as partial:
        partial.write_text("new")
        assert file.read_text() == "old"
    assert file.read_text() == "new" and list(tmp_path.iterdir()) == [file]
