"""Order statistics of streams against sorting."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_tspa.rules.order_statistics import order_statistics


@settings(max_examples=60, deadline=None)
@given(data=st.data(), seed=st.integers(0, 10_000))
def test_equals_sorting_whatever_the_blocks(data, seed):
    torch.manual_seed(seed)
    lengths = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=4))
    streams = [torch.randn(n) * 10.0 ** data.draw(st.integers(-38, 38)) for n in lengths]
    for s in streams:
        s[torch.rand(len(s)) < 0.3] = 0.0
    cuts = [data.draw(st.integers(0, n)) for n in lengths]
    shares = data.draw(st.lists(st.floats(0, 0.999), min_size=1, max_size=3))
    positions = lambda n: [int(share * n) for share in shares]  # noqa: E731

    def blocks():
        for i, (s, cut) in enumerate(zip(streams, cuts)):
            yield [i], s[None, :cut]
        for i, (s, cut) in enumerate(zip(streams, cuts)):
            yield [i], s[None, cut:]

    got = order_statistics(blocks, positions)
    for row, s in zip(got, streams):
        assert torch.equal(row, s.sort().values[positions(len(s))])


def test_several_streams_in_one_block():
    x = torch.randn(3, 5, 7)
    got = order_statistics(lambda: [([2, 0, 1], x)], lambda n: [0, n - 1])
    assert torch.equal(got[[2, 0, 1]], torch.stack([x.amin((1, 2)), x.amax((1, 2))], dim=1))
