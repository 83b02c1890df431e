"""Adapter formats on disk, read as factors.  Format knowledge ends in this package."""

from mergekit_tspa.adapters.checkpoint import Checkpoint
from mergekit_tspa.adapters.factors import LoraFactors
from mergekit_tspa.adapters.geometry import AttentionGeometry
from mergekit_tspa.adapters.hub import locate_adapter
from mergekit_tspa.adapters.peft_format import Adapter, read_adapter

__all__ = ["Adapter", "AttentionGeometry", "Checkpoint", "LoraFactors", "locate_adapter", "read_adapter"]
