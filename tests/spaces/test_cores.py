"""QR cores against the updates themselves."""

import pytest
import torch

from mergekit_tspa.spaces.cores import encode
from tests.methods.test_closed_forms import random_factors


@pytest.mark.parametrize("d_out, d_in", [(12, 10), (4, 10), (12, 4), (3, 2)])  # wide enough for all ranks, or not
@pytest.mark.parametrize("ranks", [[3], [1, 4, 2]])
def test_cores_are_the_updates(ranks, d_out, d_in):
    factors = random_factors(ranks, d_out=d_out, d_in=d_in)
    Q_B, Q_A, C = encode(factors)
    assert C.shape == (len(ranks), min(d_out, sum(ranks)), min(d_in, sum(ranks)))
    for Q in (Q_B, Q_A):
        torch.testing.assert_close(Q.mT @ Q, torch.eye(Q.shape[1], dtype=Q.dtype))
    torch.testing.assert_close(Q_B @ C @ Q_A.mT, torch.stack([f.dense() for f in factors]))


def test_cores_of_float32_factors_are_float64():
    factors = [f.to(torch.float32) for f in random_factors([2, 3])]
    Q_B, Q_A, C = encode(factors)
    exact = torch.stack([f.to(torch.float64).dense() for f in factors])
    torch.testing.assert_close(Q_B @ C @ Q_A.mT, exact, rtol=1e-13, atol=1e-13)
