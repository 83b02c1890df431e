"""The method table.  A file per family; each ends in its rows."""

from mergekit_tspa.methods.base import Method, Parameters, Report, WeightInputs
from mergekit_tspa.methods.factor_linear import factor_linear_method
from mergekit_tspa.methods.task_arithmetic import lora_task_arithmetic
from mergekit_tspa.methods.tspa import TSPA_METHODS
from mergekit_tspa.methods.update import Changed, Dense, Dora, LowRank, MergedUpdate

METHODS: dict[str, Method] = {m.name: m for m in (*TSPA_METHODS, lora_task_arithmetic, factor_linear_method)}

__all__ = [
    "METHODS",
    "Changed",
    "Dense",
    "Dora",
    "LowRank",
    "MergedUpdate",
    "Method",
    "Parameters",
    "Report",
    "WeightInputs",
]
