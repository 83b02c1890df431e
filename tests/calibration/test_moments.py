"""Statistics of inputs, beside plain hooks on PEFT models that run one adapter at a time."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mergekit_tspa.adapters import Adapter
from mergekit_tspa.base.tensors import ModelTensors
from mergekit_tspa.calibration.batches import make_batches
from mergekit_tspa.calibration.examples import Example
from mergekit_tspa.calibration.layers import Update, beside
from mergekit_tspa.calibration.moments import (
    DenseInputs,
    SketchedInputs,
    SketchedMoment,
    input_statistics,
    merge_in_order,
)
from mergekit_tspa.calibration.singles import Singles
from mergekit_tspa.errors import InputError
from mergekit_tspa.rules.regmean import low_rank_moment, regmean
from mergekit_tspa.updates import LoraFactors
from tests.calibration.conftest import module_of, peft_model, random_texts, singles_of
from tests.conftest import load_model, relative_error, save_adapter, save_llama


@torch.no_grad()
def plain(model: torch.nn.Module, modules: dict[str, torch.nn.Module], texts) -> dict[str, torch.Tensor]:
    """`mean x x^T` by tensor, from one text at a time, without padding."""
    seen = {tensor: [] for tensor in modules}
    hooks = [
        module.register_forward_pre_hook(
            lambda _m, args, tensor=tensor: seen[tensor].append(args[0].flatten(0, -2))
        )
        for tensor, module in modules.items()
    ]
    for example in texts:
        model(input_ids=torch.tensor([example.tokens]))
    for hook in hooks:
        hook.remove()
    inputs = {tensor: torch.cat(found).double() for tensor, found in seen.items()}
    return {tensor: X.mT @ X / len(X) for tensor, X in inputs.items()}


def by_peft(base, path, singles, texts) -> dict[str, torch.Tensor]:
    model = peft_model(base, path)
    return plain(model, {tensor: module_of(model, tensor) for tensor in singles.updates[path.name]}, texts)


def compare(statistics, expected, tolerance=1e-5):
    assert statistics.keys() == expected.keys()
    for tensor, found in statistics.items():
        assert relative_error(found.dense(), expected[tensor]) < tolerance, tensor


def test_one_pass_equals_peft_one_adapter_at_a_time(family):
    base, paths = family
    singles = singles_of(base, paths)
    texts = random_texts(singles.names)
    # All texts are in one batch, so that rows of different adapters and lengths stand side by side.
    assert len(singles.batches(texts)) == 1 and len(singles.batches(texts)[0].parts) == len(paths)
    found = input_statistics(singles, texts)
    for path in paths:
        compare(found[path.name], by_peft(base, path, singles, texts[path.name]))
        assert {s.tokens for s in found[path.name].values()} == {sum(len(e.tokens) for e in texts[path.name])}


@pytest.mark.parametrize("tokens", [1, 30])
def test_batches_change_nothing(llama, adapters, tokens):
    singles = singles_of(llama, adapters)
    texts = random_texts(singles.names, count=5)
    whole, parts = (input_statistics(singles, texts, batch_tokens=n) for n in (10**6, tokens))
    assert len(singles.batches(texts, tokens)) > 3
    for name in singles.names:
        compare(parts[name], {tensor: s.dense() for tensor, s in whole[name].items()})


def test_padding_does_not_count(llama, adapters):
    """A short text has the same statistics beside a long one of another adapter."""
    singles = singles_of(llama, adapters)
    texts = random_texts(singles.names, count=1)
    one, two, _ = singles.names
    long = texts | {two: [Example((1,) * 50, ())]}
    a, b = input_statistics(singles, texts)[one], input_statistics(singles, long)[one]
    compare(b, {tensor: s.dense() for tensor, s in a.items()})
    assert [s.tokens for s in a.values()] == [s.tokens for s in b.values()]


def test_inputs_that_tensors_share_are_taken_once(llama, adapters):
    singles = singles_of(llama, adapters)
    found = input_statistics(singles, random_texts(singles.names))["three"]
    layer = {tensor.split(".")[-2]: s for tensor, s in found.items() if ".layers.0." in tensor}
    assert len(layer) == 7
    assert layer["q_proj"] is layer["k_proj"] is layer["v_proj"]
    assert layer["gate_proj"] is layer["up_proj"]
    assert len({id(s) for s in layer.values()}) == 4


def test_dora_pissa_and_trained_tensors(llama, tmp_path):
    """What an adapter is besides plain factors is part of the model that reads its texts."""
    dora = save_adapter(llama, tmp_path / "dora", seed=7, use_dora=True)
    norms = save_adapter(llama, tmp_path / "norms", seed=8, modules_to_save=["input_layernorm"])
    pissa = save_adapter(llama, tmp_path / "pissa", seed=9, init_lora_weights="pissa")
    paths = [dora, norms, pissa]
    singles = singles_of(llama, paths)
    before = {name: tensor.clone() for name, tensor in singles.model.state_dict().items()}
    texts = random_texts(singles.names)
    found = input_statistics(singles, texts)
    for path in paths:
        compare(found[path.name], by_peft(llama, path, singles, texts[path.name]))
    after = singles.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_embeddings_have_the_shares_of_their_rows(tmp_path):
    base = save_llama(tmp_path / "base", tie_word_embeddings=False)
    path = save_adapter(
        base, tmp_path / "a", target_modules=["embed_tokens", "q_proj"], save_embedding_layers=False
    )
    singles = singles_of(base, [path])
    texts = {"a": [Example((3, 3, 5), (7,))]}
    found = input_statistics(singles, texts)["a"]
    embedding = found["model.embed_tokens.weight"]
    assert embedding.rest.tolist() == [{3: 0.5, 5: 0.25, 7: 0.25}.get(i, 0.0) for i in range(96)]
    tensor = "model.layers.1.self_attn.q_proj.weight"
    expected = plain(*(lambda m: (m, {tensor: module_of(m, tensor)}))(peft_model(base, path)), texts["a"])
    assert relative_error(found[tensor].dense(), expected[tensor]) < 1e-5


def test_an_adapted_head_is_read(tmp_path):
    base = save_llama(tmp_path / "base", tie_word_embeddings=False)
    path = save_adapter(
        base, tmp_path / "a", target_modules=["lm_head", "q_proj"], save_embedding_layers=False
    )
    singles = singles_of(base, [path])
    texts = random_texts(["a"])
    compare(input_statistics(singles, texts)["a"], by_peft(base, path, singles, texts["a"]))


class Experts(torch.nn.Module):
    """Two experts with modules of their own; each token goes to one of them."""

    def __init__(self, mlp: torch.nn.Module, d: int):
        super().__init__()
        self.experts = torch.nn.ModuleList([mlp, type(mlp)(mlp.config)])
        self.gate = torch.nn.Linear(d, 2, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat, y = x.flatten(0, 1), torch.empty_like(x.flatten(0, 1))
        chosen = self.gate(flat).argmax(-1)
        for number, expert in enumerate(self.experts):
            y[chosen == number] = expert(flat[chosen == number])
        return y.view_as(x)


def routed_singles() -> tuple[Singles, list[Adapter]]:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=96, num_hidden_layers=2, **sizes)).eval()
    for layer in model.model.layers:
        layer.mlp = Experts(layer.mlp, 16)
    modules = [f"model.layers.{i}.mlp.experts.{e}.up_proj" for i in (0, 1) for e in (0, 1)]
    adapters = [
        Adapter.from_factors(name, {m: (torch.randn(24, 2) * 0.3, torch.randn(2, 16) * 0.3) for m in modules})
        for name in ("a", "b")
    ]
    return Singles(model, ModelTensors.of("base", model.state_dict()), adapters), adapters


def test_experts_see_their_own_tokens_only():
    singles, adapters = routed_singles()
    texts = random_texts(singles.names, count=4)
    found = input_statistics(singles, texts)
    for adapter in adapters:
        with singles.alone([(adapter.name, slice(0, 1))]):
            modules = {tensor: layer.module for tensor, layer in singles.layers.items()}
            compare(found[adapter.name], plain(singles.model, modules, texts[adapter.name]))
        tokens = [s.tokens for s in found[adapter.name].values()]
        total = sum(len(example.tokens) for example in texts[adapter.name])
        assert tokens[0] + tokens[1] == tokens[2] + tokens[3] == total
        assert 0 < tokens[0] < total
    with pytest.raises(InputError, match="cannot be merged in one pass"):
        merge_in_order(singles, texts, lambda *_: None)


def test_sketch_of_a_decaying_spectrum():
    """What streams through the sketch is close to the best of that rank, and the diagonal is exact."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.arange(1, 201).float() ** -1.5
    turn = torch.linalg.qr(torch.randn(200, 200, generator=generator)).Q
    X = torch.randn(3000, 200, generator=generator) * scale @ turn
    moment = SketchedMoment(200, 16, X.device)
    for part in X.split(250):
        moment.add(part)
    found, C = moment.mean(), X.mT.double() @ X.double() / len(X)
    assert found.tokens == 3000 and found.U.shape == (200, 16)
    torch.testing.assert_close(found.dense().diagonal().double(), C.diagonal(), rtol=1e-4, atol=1e-8)
    U, values, rest = low_rank_moment(C, 16)
    best = (U * values) @ U.mT + rest.diag()
    assert relative_error(found.dense(), C) < 1.01 * relative_error(best, C)
    torch.testing.assert_close(found.values.double(), values, rtol=1e-3, atol=1e-8)


def test_forms_of_statistics():
    X = torch.randn(50, 12, generator=torch.Generator().manual_seed(0))
    C = X.mT @ X / 50
    dense = DenseInputs(C, 50)
    torch.testing.assert_close(dense.low_rank(12).dense(), C)
    U, values, rest = low_rank_moment(C, 5)
    found = dense.low_rank(5)
    torch.testing.assert_close(found.dense(), ((U * values) @ U.mT + rest.diag()).float())
    assert found.tokens == 50
    fewer = found.low_rank(3)
    assert isinstance(fewer, SketchedInputs) and fewer.U.shape == (12, 3)
    torch.testing.assert_close(fewer.dense(), dense.low_rank(3).dense())


def test_sketches_in_a_pass(llama, adapters):
    singles = singles_of(llama, adapters)
    texts = random_texts(singles.names, count=12)
    dense = input_statistics(singles, texts)
    sketched = input_statistics(singles, texts, k=64, dense_up_to=10, batch_tokens=100)
    few = input_statistics(singles, texts, k=8, dense_up_to=10, batch_tokens=100)
    for tensor, found in dense["one"].items():
        assert isinstance(sketched["one"][tensor], SketchedInputs)
        assert relative_error(sketched["one"][tensor].dense(), found.dense()) < 1e-4
        assert few["one"][tensor].U.shape[1] == 8
        torch.testing.assert_close(few["one"][tensor].dense().diagonal(), found.dense().diagonal())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_overflow_names_the_layer_and_the_adapter(llama, adapters, dtype):
    singles = singles_of(llama, adapters, dtype)
    down = next(tensor for tensor in singles.layers if "layers.0.mlp.down_proj" in tensor)
    factors = singles.updates["three"]["model.layers.0.mlp.up_proj.weight"]
    singles.updates["three"]["model.layers.0.mlp.up_proj.weight"] = factors._replace(B=factors.B * 1e38)
    with pytest.raises(InputError, match=rf"{down}: .*{str(dtype)[6:]} with three"):
        input_statistics(singles, random_texts(singles.names))


def test_texts_and_adapters_must_fit(llama, adapters):
    singles = singles_of(llama, adapters)
    texts = random_texts(singles.names)
    with pytest.raises(InputError, match="texts for other"):
        input_statistics(singles, texts | {"other": texts["one"]})
    with pytest.raises(InputError, match="two: there are no texts"):
        input_statistics(singles, texts | {"two": []})
    with pytest.raises(InputError, match="different names"):
        singles_of(llama, [adapters[0], adapters[0]])
    conv = torch.nn.Sequential(torch.nn.Conv1d(3, 4, 2))
    with pytest.raises(InputError, match="is no linear layer"):
        Singles(
            conv,
            ModelTensors.of("conv", conv.state_dict()),
            [Adapter.from_factors("a", {"0": (torch.ones(4, 1), torch.ones(1, 6))})],
        )
    fused = {f"model.layers.0.mlp.experts.up[{e}]": (torch.ones(4, 1), torch.ones(1, 6)) for e in (0, 1)}
    with pytest.raises(InputError, match="is no linear layer, embedding or expert"):
        Singles(
            load_model(llama),
            ModelTensors("fused", {"model.layers.0.mlp.experts.up": (2, 4, 6)}),
            [Adapter.from_factors("a", fused)],
        )


def test_progress_names_adapters_layers_and_pace(llama, adapters):
    singles, heard = singles_of(llama, adapters), []
    input_statistics(
        singles, random_texts(singles.names), progress=lambda stage, done, left: heard.append((stage, done))
    )
    assert len(heard) == len(singles.layers)
    stage, done = heard[8]
    assert "one, two, three, model.layers.1." in stage and stage.endswith("texts a second")
    assert [d for _, d in heard] == sorted(d for _, d in heard) and 0 < done < 1


def test_batches_hold_alike_texts():
    texts = random_texts("ab", count=20)
    batches = make_batches(texts, 60)
    assert sum(len(batch.examples) for batch in batches) == 40
    assert all(batch.ids.numel() <= 60 for batch in batches)
    assert sum(int(batch.counts.sum()) for batch in batches) > 0.8 * sum(
        batch.ids.numel() for batch in batches
    )
    assert any(len(batch.parts) == 2 for batch in batches)
    assert all(len(batch.parts) == 1 for batch in make_batches(texts, 60, apart=True))
    assert all(batch.counts.all() for batch in make_batches(texts, 60, padded=False))


def solver(singles):
    def solve(tensor, inputs):
        turn = singles.layers[tensor].transposed
        factors = [singles.factors[name][tensor] for name in inputs]
        factors = [LoraFactors(f.A.mT, f.B.mT) if turn else f for f in factors]
        moments = [found.dense() for found in inputs.values()]
        Bs, As = [f.B for f in factors], [f.A for f in factors]
        B, A = regmean(Bs, As, moments, torch.ones(len(factors)), rank=4)
        merged = LoraFactors(B.float(), A.float())
        return LoraFactors(merged.A.mT, merged.B.mT) if turn else merged

    return solve


def test_merging_in_one_pass_equals_layer_by_layer(family):
    """RegMean++: the inputs of a layer are those of the model that is merged below it."""
    base, paths = family
    singles = singles_of(base, paths)
    texts, solve = random_texts(singles.names), solver(singles)
    found = merge_in_order(singles, texts, solve)
    assert list(found) == list(singles.layers)

    expected = {}
    for tensor, layer in singles.layers.items():
        moments = {}
        for name in singles.names:
            if tensor not in singles.updates[name]:
                continue
            added = {t: [(slice(None), Update.of(f, singles.layers[t]))] for t, f in expected.items()}
            with beside(singles.layers.values(), added, 1):
                C = plain(singles.model, {tensor: layer.module}, texts[name])[tensor]
            moments[name] = DenseInputs(C, 0)
        expected[tensor] = solve(tensor, moments)
        assert relative_error(found[tensor].dense(), expected[tensor].dense()) < 1e-4, tensor

    # It differs from RegMean, whose inputs are those of the single adapters, beyond the first layer.
    alone = input_statistics(singles, texts)
    several = {tensor: [name for name in singles.names if tensor in alone[name]] for tensor in expected}
    last, names = next((tensor, names) for tensor, names in reversed(several.items()) if len(names) > 1)
    separate = solve(last, {name: alone[name][last] for name in names})
    assert relative_error(separate.dense(), expected[last].dense()) > 0.01


def test_a_tensor_that_is_never_multiplied_is_named(llama, adapters, monkeypatch):
    singles = singles_of(llama, adapters[:1])
    layer = next(iter(singles.layers.values()))
    # The attention takes its query from another layer, so the adapted one is there and never called.
    attention = singles.model.model.layers[0].self_attn
    monkeypatch.setattr(attention, "q_proj", torch.nn.Linear(64, 64, bias=False))
    with pytest.raises(InputError, match=f"{layer.tensor}: the model multiplies with it in a way"):
        input_statistics(singles, random_texts(singles.names))
