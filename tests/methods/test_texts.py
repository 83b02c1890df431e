"""Methods that look at texts: against plain formulas on what PEFT's own models see, and what they promise."""

import shutil
import weakref
from collections import Counter

import pytest
import torch
from peft import PeftModel

from mergekit_tspa import InputError, add_merged_adapter, merge_adapters, read_adapter
from mergekit_tspa.base.checkpoint import Checkpoint
from mergekit_tspa.calibration.gradients import squared_gradients
from mergekit_tspa.calibration.score import score, single_answers
from mergekit_tspa.calibration.store import calibration_file, hash_adapter, hash_base, save_statistics
from mergekit_tspa.merging.merge import load_tensor
from mergekit_tspa.methods.text_regmean import _solved
from tests.calibration.conftest import peft_model, singles_of, tiny_tokenizer
from tests.conftest import LINES, load_model, relative_error, save_adapter, save_gpt2, turned, write_lines

GUIDED = ("regmean", "regmean_plus", "fisher", "distill")


@pytest.fixture(scope="module")
def conv1d(tmp_path_factory):
    folder = tmp_path_factory.mktemp("conv1d")
    base = save_gpt2(folder / "base")
    tiny_tokenizer().save_pretrained(base)
    options = {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}
    adapters = [
        save_adapter(base, folder / name, seed=seed, **options) for name, seed in (("a", 1), ("b", 2))
    ]
    return (
        base,
        adapters,
        [write_lines(folder / "a.jsonl"), write_lines(folder / "b.jsonl", turned(LINES, 4))],
    )


def merged(method, setting, weights=None, **parameters):
    base, adapters, texts = setting
    return merge_adapters(method, adapters, weights, base=base, examples=texts, **parameters)


def encoded(base, file):
    from mergekit_tspa.calibration.examples import read_examples
    from mergekit_tspa.calibration.load import load_tokenizer

    return read_examples(file, load_tokenizer(base)).examples


def inputs_by_peft(model: PeftModel, module: str, examples) -> torch.Tensor:
    """What a layer of one PEFT model is given, text by text."""
    seen = []
    hook = model.get_submodule(f"base_model.model.{module}").register_forward_pre_hook(
        lambda _, args: seen.append(args[0].detach().flatten(0, -2))
    )
    with torch.no_grad():
        for example in examples:
            model(input_ids=torch.tensor([example.tokens]))
    hook.remove()
    return torch.cat(seen).double()


@pytest.mark.parametrize("family", ["speaking", "conv1d"])
def test_regmean_is_the_formula_on_what_peft_s_models_see(family, request):
    """Each layer by itself, in full size: `(sum_t a_t D_t C_t)(sum_t a_t C_t)^-1` with its ridge."""
    base, paths, texts = setting = request.getfixturevalue(family)
    a, ridge = (1.0, 0.5), 0.01
    found = merged("regmean", setting, a, lambda_=1.0, rank=5 if family == "speaking" else 8)
    models = [peft_model(base, path) for path in paths]
    adapters = [merge_adapters("lora_task_arithmetic", [path], base=base) for path in paths]
    for module, update in found.items():
        total, S = 0.0, 0.0
        for a_t, model, single, file in zip(a, models, adapters, texts):
            if module not in single:
                continue
            X = inputs_by_peft(model, module, encoded(base, file))
            C = X.T @ X / len(X)
            C += ridge * C.diagonal().mean() * torch.eye(len(C))
            D = single[module].dense().double()
            total, S = total + a_t * (D.T if family == "conv1d" else D) @ C, S + a_t * C
        want = total @ torch.linalg.inv(S)
        assert relative_error(update.dense(), want.T if family == "conv1d" else want) < 1e-3, module


@pytest.mark.parametrize("family", ["speaking", "conv1d"])
@pytest.mark.parametrize("method", GUIDED)
def test_one_adapter_comes_back_as_itself(method, family, request):
    base, adapters, texts = request.getfixturevalue(family)
    options = {"steps": 0, "lambda_": 1.0} if method == "distill" else {"lambda_": 1.0}
    one = merge_adapters(method, adapters[:1], [0.7], base=base, examples=texts[:1], **options)
    plain = merge_adapters("lora_task_arithmetic", adapters[:1], base=base)
    assert one.keys() == plain.keys()
    for module, update in one.items():
        assert relative_error(update.dense(), plain[module].dense()) < 1e-3


@pytest.mark.parametrize("method", ["regmean", "regmean_plus", "distill"])
def test_the_result_has_the_largest_rank_of_an_adapter(method, speaking):
    options = {"steps": 2} if method == "distill" else {}
    found = merged(method, speaking, **options)
    assert {update.rank for update in found.values()} == {3}
    assert {update.rank for update in merged(method, speaking, rank=2, **options).values()} == {2}


@pytest.mark.parametrize("method", GUIDED)
def test_updates_that_are_zero(method, speaking, caplog):
    """Of all adapters in one tensor, and of one of two in another."""
    base, adapters, texts = speaking
    one, two = (
        {m: (u.B, u.A) for m, u in merge_adapters("core_tsv", [a], base=base).items()} for a in adapters
    )
    down, q = "model.layers.0.mlp.down_proj", "model.layers.0.self_attn.q_proj"
    one[down] = (torch.zeros_like(one[down][0]), one[down][1])
    one[q] = (torch.zeros_like(one[q][0]), one[q][1])
    options = {"steps": 0} if method == "distill" else {}
    found = merge_adapters(method, [one, two], base=base, examples=texts, **options)
    assert not found[down].dense().any() and found[q].dense().any()
    assert "its update of 2 weights is zero" in caplog.text


def test_lambda_is_found_by_the_texts(speaking):
    """The search cannot do worse than length 1, on the texts that it looked at."""
    base, adapters, texts = speaking
    found, plain = merged("regmean", speaking), merged("regmean", speaking, lambda_=1.0)
    scale = found["model.layers.0.self_attn.q_proj"].norm() / plain["model.layers.0.self_attn.q_proj"].norm()
    assert 0.25 <= scale <= 2.5 and abs(scale - 1) > 1e-3
    for module in found:
        assert relative_error(found[module].dense(), scale * plain[module].dense()) < 1e-4
    singles = singles_of(base, adapters)
    examples = {path.name: encoded(base, file) for path, file in zip(adapters, texts)}
    answers = single_answers(singles, examples)

    def divergence(updates):
        named = {f"{module}.weight": update for module, update in updates.items()}
        none, some = score(singles, {}, answers), score(singles, named, answers)
        return sum(some[name].divergence / none[name].divergence for name in some)

    assert divergence(found) <= divergence(plain) * (1 + 1e-3)


def test_layers_above_see_the_merged_ones_at_their_length(speaking):
    """RegMean++ with twice the length: the first layer's query has twice the update, later ones have another."""
    once, twice = (merged("regmean_plus", speaking, lambda_=length) for length in (1.0, 2.0))
    first, above = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"
    assert relative_error(twice[first].dense(), 2 * once[first].dense()) < 1e-5
    assert relative_error(twice[above].dense(), 2 * once[above].dense()) > 1e-4
    plain = merged("regmean", speaking, lambda_=1.0)
    assert relative_error(once[first].dense(), plain[first].dense()) < 1e-4
    assert relative_error(once[above].dense(), plain[above].dense()) > 1e-4


def test_distillation_comes_closer_than_its_start(speaking, tmp_path):
    base, adapters, _ = speaking
    # What a random model learns from some texts says nothing of others, so all are the same.
    texts = [write_lines(tmp_path / name, LINES[i : i + 1] * 8) for i, name in enumerate("ab")]
    singles = singles_of(base, adapters)
    named = {path.name: encoded(base, file) for path, file in zip(adapters, texts)}
    answers = single_answers(singles, named)

    def divergence(**options):
        updates = merged("distill", (base, adapters, texts), **options)
        named = {f"{module}.weight": update for module, update in updates.items()}
        return sum(own.divergence for own in score(singles, named, answers).values())

    for start in ("regmean", "core_tsv", "tspa", "lora_ties"):  # far too short
        options = {"start": start, "lambda_": 0.3, "rate": 3e-3}
        assert divergence(steps=40, **options) < 0.8 * divergence(steps=0, **options)


def test_fisher_is_the_formula_on_squared_gradients_of_peft_s_models(speaking):
    base, paths, texts = speaking
    found = merged("fisher", speaking, [1.0, 0.5])
    module = "model.layers.1.self_attn.v_proj"
    F, D = [], []
    for path, file in zip(paths, texts):
        model = peft_model(base, path)
        layer = model.get_submodule(f"base_model.model.{module}").base_layer
        layer.weight.requires_grad_(True)
        squares = []
        for example in encoded(base, file):
            logits = model(input_ids=torch.tensor([example.tokens])).logits[0].float()
            ids = torch.tensor(example.tokens)
            loss = torch.nn.functional.cross_entropy(logits[example.start - 1 : -1], ids[example.start :])
            (gradient,) = torch.autograd.grad(loss, layer.weight)
            squares.append(gradient.square())
        F.append(torch.stack(squares).mean(0).double())
        D.append(merge_adapters("lora_task_arithmetic", [path], base=base)[module].dense().double())
    floor = 1e-6 * torch.stack(F).mean()
    top = 1.0 * (F[0] + floor) * D[0] + 0.5 * (F[1] + floor) * D[1]
    want = top / ((F[0] + floor) + 0.5 * (F[1] + floor))
    assert relative_error(found[module].dense(), want) < 1e-3


def test_fisher_from_the_sides_of_gradients(conv1d):
    """The rank-one form, on the sides that the exact one is made of."""
    base, paths, texts = conv1d
    found = merged("fisher", conv1d, exact=False)
    singles = singles_of(base, paths)
    examples = {path.name: encoded(base, file) for path, file in zip(paths, texts)}
    gradients = squared_gradients(singles, examples, exact=False)
    module = "transformer.h.0.mlp.c_fc"
    name = next(tensor for tensor in gradients["a"] if "h.0.mlp.c_fc" in tensor)
    F = [torch.outer(own[name].inputs, own[name].outputs).double() for own in gradients.values()]
    D = [merge_adapters("lora_task_arithmetic", [path], base=base)[module].dense().double() for path in paths]
    floor = 1e-6 * torch.stack(F).mean()
    want = sum((f + floor) * d for f, d in zip(F, D)) / sum(f + floor for f in F)
    assert relative_error(found[module].dense(), want) < 1e-3


def test_fisher_finds_its_length(speaking):
    found, plain = merged("fisher", speaking, lambda_="auto"), merged("fisher", speaking)
    scale = found["model.layers.0.self_attn.q_proj"].norm() / plain["model.layers.0.self_attn.q_proj"].norm()
    assert 0.25 <= scale <= 2.5 and abs(scale - 1) > 1e-3
    for module in found:
        assert relative_error(found[module].dense(), scale * plain[module].dense()) < 1e-4


def stored_statistics(speaking, folder):
    """A file of statistics for each adapter."""
    from mergekit_tspa.calibration.moments import input_statistics

    base, adapters, texts = speaking
    singles = singles_of(base, adapters)
    statistics = input_statistics(
        singles, {path.name: encoded(base, file) for path, file in zip(adapters, texts)}
    )
    files = []
    for path in adapters:
        files.append(calibration_file(folder, path.name))
        of = (hash_base(Checkpoint(base)), hash_adapter(read_adapter(path)))
        save_statistics(files[-1], statistics[path.name], *of, k=64)
    return files


def test_statistics_in_files_take_the_place_of_texts(speaking, tmp_path):
    base, adapters, texts = speaking
    files = stored_statistics(speaking, tmp_path)
    by_files = merge_adapters("regmean", adapters, base=base, calibration=files, lambda_=1.0, ridge=1.0)
    by_texts = merged("regmean", speaking, lambda_=1.0, ridge=1.0)
    for module in by_texts:
        assert relative_error(by_files[module].dense(), by_texts[module].dense()) < 0.02
    usual = merge_adapters("regmean", adapters, base=base, calibration=files, ridge=1.0)
    for module in usual:  # no text is there to find a length with
        assert relative_error(usual[module].dense(), 1.3 * by_files[module].dense()) < 1e-4
    mixed = merge_adapters(
        "regmean", adapters, base=base, examples=[texts[0], None], calibration=[None, files[1]]
    )
    assert mixed.keys() == by_texts.keys()
    with pytest.raises(InputError, match="of another adapter"):
        merge_adapters("regmean", adapters, base=base, calibration=files[::-1])
    with pytest.raises(InputError, match="it has none; give it"):
        merge_adapters("regmean_plus", adapters, base=base, calibration=files)


@pytest.mark.parametrize("given", ["examples", "calibration"])
def test_regmean_holds_the_factors_of_few_tensors_at_a_time(speaking, tmp_path, monkeypatch, given):
    base, adapters, texts = speaking
    files = texts if given == "examples" else stored_statistics(speaking, tmp_path)
    loaded, alive, names = [], [], []

    def watched(*args, **options):
        w = load_tensor(*args, **options)
        names.append(w.name)
        loaded.extend(weakref.ref(f.B) for f in w.factors)
        return w

    def counted(w, *rest):
        alive.append(sum(one() is not None for one in loaded))
        return _solved(w, *rest)

    monkeypatch.setattr("mergekit_tspa.merging.merge.load_tensor", watched)
    monkeypatch.setattr("mergekit_tspa.methods.text_regmean._solved", counted)
    found = merge_adapters("regmean", adapters, base=base, lambda_=1.0, **{given: files})
    assert len(alive) == len(found) >= 4
    # Of one tensor for each thread.
    assert max(alive) <= len(adapters) * min(torch.get_num_threads(), len(found) - 1)
    # To see what is zero, to solve it and, unless it is solved when it is its turn, to take it.
    assert min(Counter(names).values()) == (3 if given == "examples" else 2)


def test_adapters_write_their_own_answers_and_texts(speaking):
    base, adapters, _ = speaking
    prompts = [[{"prompt": "w1 w2"}, {"prompt": "w3"}, {"prompt": "w4 w5"}]] * 2
    options = {"base": base, "new_tokens": 6, "self_texts": 4}
    for examples in (prompts, "self"):
        found = merge_adapters("regmean", adapters, examples=examples, **options)
        again = merge_adapters("regmean", adapters, examples=examples, **options)
        other = merge_adapters("regmean", adapters, examples=examples, seed=1, **options)
        for module in found:
            assert relative_error(again[module].dense(), found[module].dense()) < 1e-5
        assert any(relative_error(other[m].dense(), found[m].dense()) > 1e-4 for m in found)
    likeliest = {"examples": prompts, "temperature": 0.0, **options}  # which a seed does not change
    one, two = (merge_adapters("regmean", adapters, seed=seed, **likeliest) for seed in (0, 1))
    assert all(relative_error(one[m].dense(), two[m].dense()) < 1e-5 for m in one)


def test_what_trained_tensors_and_magnitudes_do_stays(speaking, tmp_path):
    """DoRA's magnitudes and changed norms merge as by any method."""
    base, _, texts = speaking
    more = [
        save_adapter(base, tmp_path / "dora", seed=3, use_dora=True, target_modules=["q_proj"]),
        save_adapter(base, tmp_path / "norms", seed=4, modules_to_save=["input_layernorm"]),
    ]
    found = merge_adapters("regmean", more, base=base, examples=texts)
    plain = merge_adapters("core_tsv", more, base=base)
    assert found.keys() == plain.keys()
    name = "model.layers.0.input_layernorm"
    W = Checkpoint(base)[f"{name}.weight"]
    assert torch.allclose(found[name].apply_to(W), plain[name].apply_to(W))


@pytest.mark.parametrize("method", GUIDED)
def test_wrong_calls(method, speaking, tmp_path):
    base, adapters, texts = speaking
    empty, broken = tmp_path / "empty.jsonl", tmp_path / "broken.jsonl"
    empty.write_text("\n")
    broken.write_text('{"text": "w1 w2"}\n{"texts": "w1"}\n')
    for options, message in [
        ({}, "looks at texts of each adapter, and it has none"),
        ({"examples": texts[:1]}, "2 adapters and 1 examples"),
        ({"examples": texts[0]}, "one entry per adapter"),
        ({"examples": [texts[0], None]}, "code: .* has none; give it examples"),
        ({"examples": [texts[0], tmp_path / "no.jsonl"]}, "no.jsonl: there is no such file"),
        ({"examples": [texts[0], empty]}, "empty.jsonl: holds no examples"),
        ({"examples": [texts[0], broken]}, "broken.jsonl, line 2: has no prompt, messages or text"),
        (
            {"examples": [texts[0], 3]},
            "examples: give a file, a list of objects with text, or self for each adapter",
        ),
        ({"examples": texts, "lambda_": "long"}, "lambda: 'long'"),
    ]:
        with pytest.raises(InputError, match=message):
            merge_adapters(method, adapters, base=base, **options)
    with pytest.raises(InputError, match="give it the base model's directory"):
        merge_adapters(method, adapters, examples=texts)
    if method == "distill":
        with pytest.raises(InputError, match="start: core_tvs: did you mean core_tsv"):
            merge_adapters(method, adapters, base=base, examples=texts, start="core_tvs")
        with pytest.raises(InputError, match="at least two texts"):
            merge_adapters(method, adapters, base=base, examples=[LINES[:1], LINES])


def test_refused_rows_are_not_quoted(speaking):
    base, adapters, _ = speaking
    row = {"text": "w14 w15"}
    for examples in (row, [row, row], [{"w14 w15"}, [row]], [["w14 w15"], [row]], [[{"w14": 1}], [row]]):
        with pytest.raises(InputError) as told:
            merge_adapters("regmean", adapters, base=base, examples=examples)
        assert "w14" not in str(told.value)


def test_few_and_long_texts_are_told(speaking, tmp_path, caplog):
    base, adapters, texts = speaking
    long = [{"text": " ".join(f"w{i % 80}" for i in range(200))}] * 3
    merge_adapters("regmean", adapters, base=base, examples=[texts[0], long], lambda_=1.0)
    context = load_model(base).config.max_position_embeddings
    assert f"code: 3 of 3 texts are longer than the model's context of {context} tokens" in caplog.text
    assert "its 4 texts have" in caplog.text and "w14" not in caplog.text


def test_a_full_model_reads_its_texts_beside_an_adapter(speaking, tmp_path):
    base, adapters, texts = speaking
    tuned = shutil.copytree(base, tmp_path / "tuned")
    model = PeftModel.from_pretrained(load_model(base), adapters[0]).merge_and_unload()
    model.model.norm.weight.data += 0.1  # a tensor that is no low-rank update
    model.save_pretrained(tuned)
    one = merge_adapters("regmean", [tuned], base=base, examples=texts[:1], lambda_=1.0, extract_rank=3)
    plain = merge_adapters("lora_task_arithmetic", adapters[:1], base=base)
    for module, update in plain.items():
        assert relative_error(one[module].dense(), update.dense()) < 0.02
    both = merge_adapters("regmean", [tuned, adapters[1]], base=base, examples=texts, extract_rank=3)
    assert "model.norm" in both and plain.keys() <= both.keys()


@pytest.mark.parametrize("method", GUIDED)
def test_a_model_in_memory_reads_the_texts(method, speaking):
    base, adapters, texts = speaking
    options = {"steps": 3} if method == "distill" else {"rank": 3}
    model = PeftModel.from_pretrained(load_model(base, dtype=torch.float32), adapters[0], adapter_name="math")
    model.load_adapter(adapters[1], adapter_name="code")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    add_merged_adapter(
        model, ["math", "code"], "both", method=method, examples=texts, tokenizer=tiny_tokenizer(), **options
    )
    now = model.state_dict()
    assert all(torch.equal(now[name], tensor) for name, tensor in before.items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    model.set_adapter("both")
    found = merged(method, speaking, **options)
    layer = model.get_submodule("base_model.model.model.layers.1.self_attn.q_proj")
    want = found["model.layers.1.self_attn.q_proj"].dense()
    # The texts that distillation holds out depend on the adapters' names, which are not those of the files.
    tolerance = 0.1 if method == "distill" else 1e-3
    assert relative_error(layer.get_delta_weight("both"), want) < tolerance
    with pytest.raises(InputError, match="has no tokenizer: give tokenizer="):
        add_merged_adapter(model, ["math", "code"], "again", method=method, examples=texts, **options)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_too_little_memory_says_what_to_lower(error, speaking, monkeypatch):
    def fail(*_args, **_options):
        raise error

    monkeypatch.setattr("mergekit_tspa.calibration.readings.input_statistics", fail)
    with pytest.raises(InputError, match=r"not enough memory to read the texts: .* lower batch_tokens"):
        merged("regmean", speaking)
    error = RuntimeError("something else")
    with pytest.raises(RuntimeError, match="something else"):
        merged("regmean", speaking)
