"""What is varied: within the ranges of the method table, and never into a refusal."""

import optuna
import pytest
import torch

from mergekit_tspa import merge_adapters
from mergekit_tspa.errors import InputError
from mergekit_tspa.methods import METHODS
from mergekit_tspa.methods.inputs import Parameters
from mergekit_tspa.tuning.search_space import FIXED, WEIGHT, Range, defaults, draw, search_space, tidy

SPACES = {name: search_space(method) for name, method in METHODS.items()}
ADAPTERS = ["math", "code"]
VARIED = [(name, key) for name, space in SPACES.items() for key in space]


class At:
    """A trial that says the lowest, the highest or the last of everything, and keeps the names."""

    def __init__(self, end: str):
        self.end, self.names = end, {}

    def suggest_float(self, name, low, high, log=False):
        assert low < high and (low > 0 or not log), name
        self.names[name] = (low, high)
        return low if self.end == "low" else high

    def suggest_categorical(self, name, values):
        self.names[name] = values
        return values[0] if self.end == "low" else values[-1]


def ends(varied):
    return (varied.low, varied.high) if isinstance(varied, Range) else varied


@pytest.mark.parametrize("name", METHODS)
def test_both_ends_of_everything_are_taken(name):
    """Alone and together; `tidy` rounds none of them out of its range."""
    method = METHODS[name]
    for end in ("low", "high"):
        parameters, weights = draw(At(end), method, ADAPTERS)
        method.bind(parameters)
        method.bind(dict(tidy(parameters)))
        assert all(weight >= method.min_weight for weight in weights.values())
    for key, varied in SPACES[name].items():
        if name.endswith("della") and key in ("density", "epsilon"):
            continue  # which limit each other
        for value in ends(varied):
            method.bind(dict(tidy({key: value})))


@pytest.mark.parametrize("name", METHODS)
def test_the_default_lies_inside_under_the_same_names(name):
    method = METHODS[name]
    fields, point, trial = method.parameter_fields(), defaults(method, ADAPTERS), At("low")
    draw(trial, method, ADAPTERS)
    assert point.keys() == trial.names.keys()
    for key, varied in SPACES[name].items():
        value = point[f"{name}.{key}"]
        assert fields[key].default in (value, None) or key == "lambda", key
        if isinstance(varied, Range):
            assert varied.low <= value <= varied.high
        else:
            assert value in varied
    assert all(WEIGHT[0] <= point[f"weight of {adapter}"] <= WEIGHT[1] for adapter in ADAPTERS)
    study = optuna.create_study()
    study.enqueue_trial(point)
    parameters, weights = draw(study.ask(), method, ADAPTERS)
    assert parameters == {key: point[f"{name}.{key}"] for key in SPACES[name]}
    assert weights == dict.fromkeys(ADAPTERS, 1.0)


def test_what_is_varied():
    assert all(not {*space} & FIXED for space in SPACES.values())
    common = {*Parameters.model_fields} - {"lambda_"}
    assert all(not {*space} & common for space in SPACES.values())
    assert all("lambda" in space for space in SPACES.values())
    assert {"density", "elect", "normalize"} <= {*SPACES["lora_ties"]}
    assert all(METHODS[name].parameter_fields()[key].annotation is not int for name, key in VARIED)
    lam = SPACES["robustmerge_code"]["lambda"]
    assert lam.low < METHODS["robustmerge_code"].parameter_fields()["lambda"].default < lam.high
    assert "svc" in SPACES["core_tsv"] and "svc" not in SPACES["core_iso"]


@pytest.mark.parametrize(
    "name", [n for n, m in METHODS.items() if not (m.guided or m.solves or "attention" in n)]
)
def test_whatever_is_drawn_merges(name):
    """Parameters that refuse each other would waste trials, which a sampler does not learn from."""
    generator = torch.Generator().manual_seed(0)
    adapters = [
        {"m": tuple(torch.randn(*shape, generator=generator) for shape in ((8, 3), (3, 6)))} for _ in "ab"
    ]
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    for _ in range(6):
        parameters, _ = draw(study.ask(), METHODS[name], [])
        try:
            merged = merge_adapters(name, adapters, **parameters)
        except InputError as error:
            raise AssertionError(f"{parameters}: {error.message}") from error
        assert all(update.dense().isfinite().all() for update in merged.values())
