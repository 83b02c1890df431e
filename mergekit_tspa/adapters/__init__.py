"""Adapter formats on disk, read as factors.  Format knowledge ends in this package."""

from mergekit_tspa.adapters.adapter import Adapter
from mergekit_tspa.adapters.extract import (
    ExtractedModule,
    Extraction,
    StoredTensor,
    check_architecture,
    extract_adapter,
    log_alignment,
    log_kept,
    same_tensors,
)
from mergekit_tspa.adapters.hub import base_of_adapter, check_reachable, is_adapter, is_model, locate_adapter
from mergekit_tspa.adapters.modules import Change, LoraModule
from mergekit_tspa.adapters.reader import kind_of, read_adapter
from mergekit_tspa.adapters.turned import TurnedModule, turn_adapter

__all__ = [
    "Adapter",
    "Change",
    "ExtractedModule",
    "Extraction",
    "LoraModule",
    "StoredTensor",
    "TurnedModule",
    "base_of_adapter",
    "check_architecture",
    "check_reachable",
    "extract_adapter",
    "is_adapter",
    "is_model",
    "kind_of",
    "locate_adapter",
    "log_alignment",
    "log_kept",
    "read_adapter",
    "same_tensors",
    "turn_adapter",
]
