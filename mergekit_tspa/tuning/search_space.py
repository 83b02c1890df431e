"""What a search may vary of a method: its own parameters, within the ranges of the method table.

A number between two bounds is drawn between them.  A positive one without an upper bound is drawn from a
tenth to ten times its default, evenly in its logarithm.  Switches and words are drawn from all their values.
Whole numbers, which are ranks, counts and steps, stay at their defaults, and so does what only says how a
solver works.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from mergekit_tspa.methods.inputs import Parameters
from mergekit_tspa.methods.method import Method
from mergekit_tspa.methods.rules import RULES

# How a solver works, what texts are written, and spellings of a rule for comparison with published code.
FIXED = {
    *("seed", "solver", "tolerance", "attention_lr", "lora_lr", "rate", "momentum", "temperature", "memory"),
    *("coefficients", "convention", "published", "variant", "exact", "start", "gauge", "clamp"),
}
FLAT = {rule.name for rule in RULES if rule.flat}  # there is nothing that `svc` could do after them
LENGTH = (0.2, 3.0)  # of lambda, as a multiple of its default
WEIGHT = (0.4, 1.6)  # of an adapter's weight
SMALL = 0.05  # a default below this, between bounds from 0, is varied by its logarithm
DECADE = 10.0
INSIDE = 0.99  # how near a bound comes that is excluded


@dataclass(frozen=True)
class Range:
    """Where a number may be drawn."""

    low: float
    high: float
    log: bool = False


Choice = Sequence[Any]  # values, one of which is drawn


def search_space(method: Method) -> dict[str, Range | Choice]:
    """The parameters of a method that are varied, by their names in a recipe; `lambda` is one of them."""
    space: dict[str, Range | Choice] = {}
    flat = method.name.partition("_")[2] in FLAT
    for name, field in method.parameter_fields().items():
        if name == "lambda":
            default = field.default if isinstance(field.default, int | float) else 1.0
            space[name] = Range(LENGTH[0] * default, LENGTH[1] * default, log=True)
        elif name in Parameters.model_fields or name in FIXED or (flat and name == "svc"):
            continue
        elif found := _varied(field):
            space[name] = found
    return space


def _varied(field: FieldInfo) -> Range | Choice | None:
    kind = field.annotation
    if kind is bool:
        return (False, True)
    if get_origin(kind) is Literal:
        return get_args(kind)
    if kind is not float or not isinstance(field.default, float):
        return None
    names = ("ge", "gt", "le", "lt")
    bounds = {
        name: getattr(bound, name) for bound in field.metadata for name in names if hasattr(bound, name)
    }
    high = bounds.get("le", bounds["lt"] * INSIDE if "lt" in bounds else None)
    if high is None:
        low = max(field.default / DECADE, bounds.get("ge", 0.0))
        return Range(low, field.default * DECADE, log=True) if low > 0 else None
    if 0 < field.default < SMALL:
        return Range(field.default / DECADE, high, log=True)
    return Range(bounds.get("ge", high * (1 - INSIDE)), high)


def draw(trial: Any, method: Method, adapters: Sequence[str]) -> tuple[dict[str, Any], dict[str, float]]:
    """Parameters and weights, as a trial of Optuna suggests them.

    Args:
        trial: of a study
        method: whose parameters are drawn; their names there begin with the method's
        adapters: names of those whose weights are drawn, none for weights of 1

    Returns:
        `{parameter: value}` and `{adapter: weight}`.
    """
    parameters = {
        name: _suggested(trial, f"{method.name}.{name}", varied)
        for name, varied in search_space(method).items()
    }
    if "epsilon" in parameters:  # DELLA's, on both sides of the density
        parameters["density"] = density = min(parameters["density"], INSIDE)
        parameters["epsilon"] = min(parameters["epsilon"], INSIDE * min(density, 1 - density))
    lowest = max(WEIGHT[0], method.min_weight)
    weights = {
        name: trial.suggest_float(f"weight of {name}", lowest, WEIGHT[1], log=True) for name in adapters
    }
    return parameters, weights


def _suggested(trial: Any, name: str, varied: Range | Choice) -> Any:
    if isinstance(varied, Range):
        return trial.suggest_float(name, varied.low, varied.high, log=varied.log)
    return trial.suggest_categorical(name, list(varied))


def defaults(method: Method, adapters: Sequence[str]) -> dict[str, Any]:
    """The default point of a method in the same names, for a trial that is to start there."""
    fields = method.parameter_fields()
    point = {}
    for name, varied in search_space(method).items():
        value = fields[name].default
        if isinstance(varied, Range):
            value = min(max(value if isinstance(value, int | float) else 1.0, varied.low), varied.high)
        point[f"{method.name}.{name}"] = value
    return point | {f"weight of {name}": 1.0 for name in adapters}


def tidy(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Values as a recipe has them, numbers with three digits."""
    for name, value in values.items():
        yield name, float(f"{value:.3g}") if isinstance(value, float) else value
