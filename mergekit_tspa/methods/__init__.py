"""The method table.  A file per family; each ends in its rows."""

from mergekit_tspa.methods.compose import SPACE_RULE_METHODS
from mergekit_tspa.methods.data_free import DATA_FREE_METHODS
from mergekit_tspa.methods.factor_linear import factor_linear_method
from mergekit_tspa.methods.lora_lego import lora_lego_method
from mergekit_tspa.methods.method import Method
from mergekit_tspa.methods.robustmerge import ROBUSTMERGE_METHODS
from mergekit_tspa.methods.rotation import rotation_method
from mergekit_tspa.methods.svd_cur import svd_cur_method
from mergekit_tspa.methods.text_distill import distill_method
from mergekit_tspa.methods.text_fisher import fisher_method
from mergekit_tspa.methods.text_regmean import REGMEAN_METHODS
from mergekit_tspa.methods.tspa import TSPA_METHODS

ROWS: tuple[Method, ...] = (
    *TSPA_METHODS,
    svd_cur_method,
    *ROBUSTMERGE_METHODS,
    lora_lego_method,
    rotation_method,
    factor_linear_method,
    *REGMEAN_METHODS,
    fisher_method,
    distill_method,
    *DATA_FREE_METHODS,
    *SPACE_RULE_METHODS,
)
METHODS: dict[str, Method] = {method.name: method for method in ROWS}
MEAN_OF_MODELS = "aligned_mean"  # on full models alone, so it is no row; see `plugin/aligned_mean.py`

__all__ = ["METHODS", "Method"]
