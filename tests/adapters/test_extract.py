"""Factors of the difference between two checkpoints."""

import logging

import pytest
import torch

from mergekit_tspa import InputError
from mergekit_tspa.adapters import Extraction, extract_adapter, log_kept
from mergekit_tspa.base.tensors import ModelTensors
from mergekit_tspa.linalg import leading_triplets
from tests.conftest import relative_error

Q, NORM = "model.layers.0.self_attn.q_proj", "model.norm.weight"
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
EXPERTS = "model.layers.0.mlp.experts.down_proj"


def low_rank(*shape, rank=4, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape[0], rank, generator=generator) @ torch.randn(rank, shape[1], generator=generator)


@pytest.fixture
def base():
    torch.manual_seed(0)
    shapes = {f"{Q}.weight": (96, 80), NORM: (80,), EMBED: (50, 80), EXPERTS: (3, 12, 10)}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def extract(base, changed, config=None, base_config=None, **extraction):
    full = ModelTensors.of("full", base | changed, config)
    return extract_adapter("full", full, ModelTensors.of("base", base, base_config), Extraction(**extraction))


def test_factors_are_those_of_the_difference(base):
    D = low_rank(96, 80)
    for rank in (4, 32, None, 100):
        module = (adapter := extract(base, {f"{Q}.weight": base[f"{Q}.weight"] + D}, rank=rank)).modules[Q]
        factors = adapter.factors(Q)
        assert factors.rank == module.rank == min(rank or 32, 80) and module.shape == D.shape
        assert relative_error(factors.dense(), D) < 1e-5 and module.kept == pytest.approx(1)
        assert adapter.factors(Q).B is factors.B  # made once


def test_what_becomes_what(base):
    adapter = extract(base, {NORM: base[NORM] + 1, EXPERTS: base[EXPERTS] + low_rank(12, 10)}, rank=4)
    experts = {f"{EXPERTS}[{i}]": f"{EXPERTS}[{i}]" for i in range(3)}
    assert adapter.tensors == {f"{Q}.weight": Q} | experts and adapter.changes.keys() == {NORM, EMBED}
    assert torch.allclose(adapter.changes[NORM].difference(base[NORM]), torch.ones(80))
    for expert in experts:
        assert relative_error(adapter.factors(expert).dense(), low_rank(12, 10)) < 1e-5
    assert not adapter.factors(Q).dense().any()


def test_nothing_is_read_before_it_is_asked_for(base):
    def read(tensor):
        raise AssertionError(tensor)

    sides = (
        ModelTensors(n, {name: tuple(t.shape) for name, t in base.items()}, read=read)
        for n in ("full", "base")
    )
    adapter = extract_adapter("full", *sides, Extraction())
    assert adapter.modules[Q].rank == 32
    with pytest.raises(AssertionError, match="q_proj"):
        adapter.factors(Q)


@pytest.mark.parametrize("energy, rank", [(0.19, 1), (0.5, 3), (0.79, 4), (0.81, 5)])
def test_energy_decides_the_rank(base, energy, rank):
    """Five equal singular values, a fifth of the energy each."""
    torch.manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(n, 5)).Q for n in (96, 80))
    full = {f"{Q}.weight": base[f"{Q}.weight"] + 10 * U @ V.T}
    assert extract(base, full, energy=energy).factors(Q).rank == rank
    assert extract(base, full, energy=energy, rank=2).factors(Q).rank == min(rank, 2)


def test_energy_beyond_the_first_rank_tried():
    torch.manual_seed(0)
    base, D = {"a.weight": torch.zeros(400, 300)}, low_rank(400, 300, rank=90)
    share = torch.linalg.svdvals(D).square().cumsum(0) / D.square().sum()
    adapter = extract(base, {"a.weight": D}, energy=0.95)
    assert adapter.factors("a").rank == int((share < 0.95).sum()) + 1 and adapter.modules["a"].kept >= 0.95


@pytest.mark.parametrize("shape", [(256, 256), (300, 900), (900, 300)])
@pytest.mark.parametrize("rank", [8, 32])
def test_full_rank_differences_keep_the_optimal_energy(shape, rank):
    M = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    U, S, Vh = leading_triplets(M, rank, seed=1)
    best = torch.linalg.svdvals(M)[:rank].square().sum()
    assert S.square().sum() > 0.99 * best
    assert ((U * S) @ Vh - M).square().sum() < M.square().sum() - 0.99 * best
    for basis in (U.mT, Vh):
        assert torch.allclose(basis @ basis.mT, torch.eye(rank), atol=1e-5)


def test_same_name_same_factors():
    torch.manual_seed(0)
    base = {f"{name}.weight": torch.zeros(200, 200) for name in ("a", "b")}
    full = dict.fromkeys(base, torch.randn(200, 200))
    one, two = (extract(base, full, rank=8) for _ in range(2))
    torch.manual_seed(5)
    assert torch.equal(one.factors("a").B, two.factors("a").B)
    assert not torch.equal(one.factors("a").B, one.factors("b").B)


def test_log(base, caplog):
    cases = {
        "keep 100.0 %": low_rank(96, 80),
        "raise extract_rank": torch.randn(96, 80),
        "equal the base's": torch.zeros(96, 80),
    }
    for message, D in cases.items():
        adapter = extract(base, {f"{Q}.weight": base[f"{Q}.weight"] + D}, rank=4)
        caplog.clear()
        with caplog.at_level(logging.INFO):
            log_kept(adapter)
            assert not caplog.records  # nothing was asked for
            adapter.factors(Q)
            log_kept(adapter)
        (record,) = caplog.records
        assert record.levelname == ("INFO" if "100" in message else "WARNING")
        assert message in record.message


def test_tied_embeddings(base):
    """A head that is tied to the embedding may be stored as well, by either side."""
    tied = {"tie_word_embeddings": True}
    stored, new = base | {HEAD: base[EMBED]}, torch.ones(50, 80)
    for before, changed in (
        (base, {EMBED: new}),
        (stored, {EMBED: new, HEAD: new}),
        (base, {EMBED: new, HEAD: new}),
    ):
        adapter = extract(before, changed, tied, tied)
        assert adapter.changes.keys() == before.keys() & {NORM, EMBED, HEAD}
    full = {name: new if name == EMBED else tensor for name, tensor in base.items()}
    adapter = extract_adapter(
        "full", ModelTensors.of("full", full, tied), ModelTensors.of("b", stored, tied), Extraction()
    )
    assert torch.equal(adapter.changes[HEAD].difference(stored[HEAD]), new - stored[HEAD])


def test_bad_inputs(base):
    weight, config = f"{Q}.weight", {"model_type": "llama", "tie_word_embeddings": False}
    cases = {
        "its model_type is qwen2, that of the base base is llama": ({}, config | {"model_type": "qwen2"}),
        "only full ties": ({}, config | {"tie_word_embeddings": True}),
        r"q_proj.weight has shape \(8, 80\), but \(96, 80\) in base": ({weight: torch.zeros(8, 80)}, config),
        "resize the base to 51 tokens": ({EMBED: torch.zeros(51, 80)}, config),
        "1 tensors of full are not in base, extra.weight": ({"extra.weight": torch.zeros(2, 2)}, config),
        "quantised.*q_proj": ({weight: base[weight].to(torch.int8)}, config),
        r"quantised \(config.json\)": ({}, config | {"quantization_config": {"bits": 4}}),
    }
    for message, (changed, here) in cases.items():
        with pytest.raises(InputError, match=message):
            extract(base, changed, here, config)
    with pytest.raises(InputError, match=r"1 tensors of base are not in full, model\.norm\.weight"):
        less = {name: tensor for name, tensor in base.items() if name != NORM}
        extract_adapter("full", ModelTensors.of("full", less), ModelTensors.of("base", base), Extraction())
    with pytest.raises(InputError, match=r"q_proj\.weight.*NaN"):
        extract(base, {weight: base[weight] * torch.nan}).factors(Q)
