"""Entrywise rules on updates that are given as products `B_t A_t`, by blocks of rows.

No more than the result and one block of the updates is ever held whole.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mergekit_tspa.rules.order_statistics import order_statistics
from mergekit_tspa.rules.rule_kinds import Entrywise
from mergekit_tspa.rules.update_statistics import Block, Positions

# Entries of each update that an entrywise rule looks at in one go: few beside a tensor, even of many
# adapters, on a CPU; many for a GPU, which would wait for the next call otherwise.
BLOCK = {"cpu": 2**18, "cuda": 2**22}

Factors = Sequence[tuple[Tensor, Tensor]]  # `M_t = B_t A_t`, B_t (p, r_t) and A_t (r_t, q)


class Products(NamedTuple):
    """The updates of one tensor."""

    numbers: Sequence[int]  # which of all updates these m are
    factors: Factors  # m of them
    weights: Sequence[float]


def row_blocks(factors: Factors) -> Iterator[tuple[slice, Tensor]]:
    """Rows and their entries, in float32  # (n, rows, q)

    Everything that looks at entries gets them from here.  The size of a block depends on the shape and the
    device alone, so an entry is the same product in every pass, and a threshold taken in one pass means the
    same entry in the next.  Products of blocks of another size may round otherwise.
    """
    left, right = factors[0]
    p, q = left.shape[0], right.shape[1]
    step = max(1, BLOCK.get(left.device.type, BLOCK["cpu"]) // q)
    for start in range(0, p, step):
        rows = slice(start, start + step)
        yield rows, torch.stack([(B[rows] @ A).float() for B, A in factors])


@dataclass(frozen=True)
class Stream:
    """Updates of any number of tensors, as `Updates` of a rule's statistics."""

    tensors: Callable[[], Iterable[Products]]  # called once per pass

    def order_statistics(self, values: Callable[[Block], Tensor], positions: Positions) -> Tensor:
        def streams() -> Iterator[tuple[Sequence[int], Tensor]]:
            return ((block.numbers, values(block)) for block in self._blocks())

        return order_statistics(streams, positions)

    def sums(self, values: Callable[[Block], Tensor]) -> Tensor:
        total: dict[int, Tensor] = {}
        for block in self._blocks():
            for number, value in zip(block.numbers, values(block)):
                total[number] = total[number] + value if number in total else value
        return torch.stack([total[number] for number in range(len(total))])

    def _blocks(self) -> Iterator[Block]:
        for numbers, factors, weights in self.tensors():
            left, right = factors[0]
            size = left.shape[0] * right.shape[1]
            for _, M in row_blocks(factors):
                yield Block(numbers, M, M.new_tensor(weights), size)


def merge_rows(
    rule: Entrywise,
    factors: Factors,
    weights: Sequence[float],
    own: Mapping[str, Any],
    statistics: Tensor | None = None,
    generators: Sequence[torch.Generator] = (),
) -> Tensor:
    """`rule.merge` of the products, block of rows by block of rows.

    Args:
        own: the rule's own parameters
        statistics: what the rule asks of whole updates, if it does  # (n, k)
        generators: one per update, for a rule that draws

    Returns:
        (p, q), float32
    """
    left, right = factors[0]
    a = left.new_tensor(weights).float()
    given: dict[str, Any] = {} if statistics is None else {"statistics": statistics}
    merged = a.new_empty(left.shape[0], right.shape[1])
    for rows, M in row_blocks(factors):
        if rule.random:
            draws = [torch.rand(M.shape[1:], generator=g, device=M.device) for g in generators]
            given["uniform"] = torch.stack(draws)
        merged[rows] = rule.merge(M, a, **own, **given)
    return merged
