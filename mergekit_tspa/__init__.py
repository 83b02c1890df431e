"""LoRA-native merge methods for mergekit.

Importing the package registers its methods with mergekit (now, or as soon as mergekit is imported).
Only the standard library is imported here: torch loads this package at the end of every `import torch`.
"""

from importlib import import_module
from typing import Any

from mergekit_tspa._startup import install

__version__ = "0.2.0"

_LAZY = {
    "AttentionGeometry": "mergekit_tspa.base.geometry",
    "InputError": "mergekit_tspa.errors",
    "LoraFactors": "mergekit_tspa.updates",
    "METHODS": "mergekit_tspa.methods",
    "MergedAdapters": "mergekit_tspa.merging.api",
    "add_merged_adapter": "mergekit_tspa.merging.loaded",
    "merge_adapters": "mergekit_tspa.merging.api",
    "read_adapter": "mergekit_tspa.adapters",
    "score": "mergekit_tspa.scoring.scores",
    "tune": "mergekit_tspa.tuning.searches",
}
__all__ = [*_LAZY, "install"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


install()
