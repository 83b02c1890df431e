"""The method table.  A file per family; each ends in its rows."""

from mergekit_tspa.methods.base import Method, Parameters, Report, WeightInputs
from mergekit_tspa.methods.factor_linear import factor_linear_method
from mergekit_tspa.methods.space_rule import SPACE_RULE_METHODS
from mergekit_tspa.methods.tspa import TSPA_METHODS
from mergekit_tspa.methods.update import Dense, LowRank, MergedUpdate

METHODS: dict[str, Method] = {m.name: m for m in (*TSPA_METHODS, factor_linear_method, *SPACE_RULE_METHODS)}

__all__ = ["METHODS", "Dense", "LowRank", "MergedUpdate", "Method", "Parameters", "Report", "WeightInputs"]
