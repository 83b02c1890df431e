"""Initialisations that take a part out of the base's tensor.

Training starts from `W - part + scale B A = W`, where `B A` are the factors at the start.
The adapter's update of the unchanged base is then `scale B A - part`, of twice its rank.  Rows of `kinds.py`
name these functions.

Args of both:
    W: the base's tensor  # (d_out, d_in)
    rank: of the adapter, r
    scale: of the adapter, `alpha / r` or `alpha / sqrt(r)`
"""

import torch
from torch import Tensor

from mergekit_tspa.updates import LoraFactors


def pissa_part(W: Tensor, rank: int, scale: float) -> LoraFactors:
    """`U_r S_r V_r^T`, the largest singular triplets, whatever the scale.

    Meng et al., PiSSA, 2024 (arXiv 2404.02948).
    """
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    root = S[:rank].sqrt()
    return LoraFactors(U[:, :rank] * root, root[:, None] * Vh[:rank])


def olora_part(W: Tensor, rank: int, scale: float) -> LoraFactors:
    """`scale Q_r R_r` of `W = Q R`.  Büyükakyüz, OLoRA, 2024 (arXiv 2406.01775)."""
    Q, R = torch.linalg.qr(W)
    return LoraFactors(Q[:, :rank], R[:rank]).scaled(scale)
