"""Scores of merges in memory, beside models that have them in their tensors."""

import re
from itertools import pairwise

import pytest
import torch

from mergekit_tspa.calibration.examples import Example
from mergekit_tspa.calibration.score import line_search, score, search_lambda, single_answers
from mergekit_tspa.errors import InputError
from mergekit_tspa.merging.api import merge_adapters
from mergekit_tspa.updates import LoraFactors
from tests.calibration.conftest import peft_model, random_texts, singles_of
from tests.conftest import base_tensors, load_model, save_adapter, save_llama


@torch.no_grad()
def said(model, example) -> torch.Tensor:
    """Log-probabilities of the answer's positions, from one text without padding."""
    logits = model(input_ids=torch.tensor([example.tokens])).logits[0]
    return logits[example.start - 1 : len(example.tokens) - 1].log_softmax(-1)


def expected(base, path, merged, texts) -> tuple[float, float]:
    """Loss and divergence of a model, from full distributions."""
    single, losses, divergences = peft_model(base, path), [], []
    for example in texts:
        p, q = said(single, example), said(merged, example)
        ids = torch.tensor(example.tokens[example.start :])
        losses.append(-q.gather(1, ids[:, None])[:, 0])
        divergences.append((p.exp() * (p - q)).sum(-1))
    return torch.cat(losses).mean().item(), torch.cat(divergences).mean().item()


def merge_of(singles) -> dict[str, LoraFactors]:
    merged = {}
    for tensor in singles.layers:
        own = [factors[tensor] for factors in singles.factors.values() if tensor in factors]
        merged[tensor] = LoraFactors(torch.cat([f.B for f in own], 1) / 3, torch.cat([f.A for f in own]))
    return merged


@pytest.mark.parametrize("tokens", [2048, 20])
def test_scores_are_those_of_a_merged_model(family, tokens):
    base, paths = family
    singles = singles_of(base, paths)
    texts, updates = random_texts(singles.names), merge_of(singles)
    answers = single_answers(singles, texts, top=96, batch_tokens=tokens)
    found = score(singles, updates, answers, scale=0.7, batch_tokens=tokens)
    merged = load_model(base).eval()
    with torch.no_grad():
        for tensor, update in updates.items():
            weight = singles.layers[tensor].path + ".weight"
            merged.get_parameter(weight).add_(0.7 * update.dense())
    for path in paths:
        loss, kl = expected(base, path, merged, texts[path.name])
        assert found[path.name].loss == pytest.approx(loss, rel=1e-4)
        assert found[path.name].divergence == pytest.approx(kl, rel=1e-3)


def test_scoring_leaves_the_base_bit_for_bit(llama, adapters, tmp_path):
    paths = [*adapters, save_adapter(llama, tmp_path / "norms", modules_to_save=["input_layernorm"])]
    singles = singles_of(llama, paths)
    model = singles.model.train().requires_grad_(True)
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    answers = single_answers(singles, random_texts(singles.names))
    score(singles, merge_of(singles), answers, 0.5)
    with pytest.raises(InputError, match="NaN or infinite"):
        # A value, not a query or key: some kernels of attention turn scores that are NaN into numbers.
        tensor = next(name for name in singles.layers if "v_proj" in name)
        d_out, d_in = singles.factors[singles.names[0]][tensor].shape
        broken = LoraFactors(torch.full((d_out, 1), torch.nan), torch.ones(1, d_in))
        score(singles, {tensor: broken}, answers)
    known = base_tensors(llama)
    assert model.state_dict().keys() == known.keys()
    assert all(torch.equal(tensor, known[name]) for name, tensor in model.state_dict().items())
    assert hooks == [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())


def test_a_single_adapter_is_no_distance_from_itself(llama, adapters):
    singles = singles_of(llama, adapters)
    answers = single_answers(singles, random_texts(singles.names), top=8)
    for name in singles.names:
        found = score(singles, singles.factors[name], answers)
        assert abs(found[name].divergence) < 1e-6
        assert all(found[other].divergence > 1e-3 for other in singles.names if other != name)


def test_few_kept_tokens_bound_the_divergence_from_below(llama, adapters):
    singles = singles_of(llama, adapters)
    texts = random_texts(singles.names)
    by_top = [
        score(singles, {}, single_answers(singles, texts, top))["three"].divergence
        for top in (1, 8, 48, 95, 96)
    ]
    for fewer, more in pairwise(by_top):
        assert fewer <= more * (1 + 1e-4)
    assert by_top[0] < 0.9 * by_top[-1]
    assert by_top[-2] == pytest.approx(by_top[-1], rel=1e-3)


def test_texts_without_answers_are_left_out(llama, adapters):
    singles = singles_of(llama, adapters[:1])
    texts = {"one": [Example((1, 2), ()), Example((1, 2), (3,)), Example((), (4, 5)), Example((), (4,))]}
    answers = single_answers(singles, texts)
    assert [len(a.tokens) for a in answers["one"]] == [1, 1]
    with pytest.raises(InputError, match="one: there are no texts"):
        single_answers(singles, {"one": texts["one"][:1]})


def test_adapted_heads_are_scored(tmp_path):
    base = save_llama(tmp_path / "base", tie_word_embeddings=False)
    path = save_adapter(
        base, tmp_path / "a", target_modules=["lm_head", "q_proj"], save_embedding_layers=False
    )
    singles = singles_of(base, [path])
    texts = random_texts(["a"])
    found = score(singles, {}, single_answers(singles, texts, top=96))["a"]
    loss, kl = expected(base, path, load_model(base).eval(), texts["a"])
    assert (found.loss, found.divergence) == (pytest.approx(loss, rel=1e-4), pytest.approx(kl, rel=1e-3))


def test_merges_of_the_python_entry_can_be_scored(family):
    """Their tensors are named and turned as here, so that one adapter merged alone is no distance from itself."""
    base, paths = family
    singles = singles_of(base, paths)
    updates = merge_adapters("lora_task_arithmetic", paths[:1], base=base)
    updates = {f"{module}.weight": update for module, update in updates.items()}
    found = score(singles, updates, single_answers(singles, random_texts(singles.names)))
    assert [abs(found[path.name].divergence) < 1e-5 for path in paths] == [True] + [False] * (len(paths) - 1)


@pytest.mark.parametrize(("least", "points"), [(1.3, 4), (1.0, 5), (1.9, 7), (0.6, 7)])
def test_line_search_finds_the_least_of_a_parabola(least, points):
    calls = []

    def divergences(x):
        calls.append(x)
        return {"a": 2 + (x - least) ** 2, "b": 5 * (2 + (x - least) ** 2), "unmoved": 1e-9}

    found = line_search(divergences)
    assert found.lambda_ == pytest.approx(least)
    assert len(calls) == points == len(found.tried) + 1
    assert found.tried[1.25] == pytest.approx((2 + (1.25 - least) ** 2) / (2 + least**2))


def test_line_search_stays_in_its_range():
    assert line_search(lambda x: {"a": 9 - x}).lambda_ == 2.5
    assert line_search(lambda x: {"a": 9 + x}).lambda_ == 0.25
    assert line_search(lambda x: {"a": 0.0}) == (1.0, {})


def test_search_of_lambda(llama, adapters):
    """Half of an adapter needs a factor of two."""
    singles, heard = singles_of(llama, adapters[:1]), []
    answers = single_answers(singles, random_texts(["one"]))
    half = {tensor: factors.scaled(0.5) for tensor, factors in singles.factors["one"].items()}
    found = search_lambda(
        singles, half, answers, progress=lambda stage, done, left: heard.append((stage, done))
    )
    assert found.lambda_ == pytest.approx(2, abs=0.1)
    assert min(found.tried.values()) < 0.01
    assert re.fullmatch(r"lambda: one, [\d.e+]+ texts a second", heard[0][0])
    assert heard[0][1] == 0.25 and heard[-1][1] == 1
