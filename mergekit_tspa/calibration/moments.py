"""Second moments of the inputs of adapted layers, `C_t = mean x x^T` while the model reads texts with adapter
t.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from mergekit_tspa.adapters.on_disk import Factor, in_memory
from mergekit_tspa.calibration.batches import Batch, Texts
from mergekit_tspa.calibration.layers import (
    EVERYTHING,
    Layer,
    Parts,
    Progress,
    Update,
    beside,
    in_rows,
    silent,
)
from mergekit_tspa.calibration.singles import BATCH_TOKENS, Pace, Singles
from mergekit_tspa.errors import InputError
from mergekit_tspa.linalg import finite, leading_triplets
from mergekit_tspa.updates import LoraFactors

RANK = 64  # of the sketch; as good as the full matrix for RegMean on the models that were tried
DENSE_UP_TO = 1024


class DenseInputs(NamedTuple):
    """`C` itself."""

    C: Tensor  # (d_in, d_in)
    tokens: int

    def dense(self) -> Tensor:
        return self.C

    def trace(self) -> Tensor:
        """The inputs' mean square length."""
        return self.C.trace()

    def low_rank(self, k: int = RANK) -> "SketchedInputs":
        """The `k` largest eigenvalues, and what they leave of the diagonal, which stays exact."""
        values, U = torch.linalg.eigh(self.C.double())
        values, U = values.flip(0)[:k].clamp(min=0), U.flip(1)[:, :k]
        rest = (self.C.diagonal().double() - U.square() @ values).clamp(min=0)
        return SketchedInputs(U.float(), values.float(), rest.float(), self.tokens)


class SketchedInputs(NamedTuple):
    """`C ~ U diag(l) U^T + diag(rest)`, with the diagonal of `C`."""

    U: Tensor  # (d_in, k)
    values: Tensor  # l (k,)
    rest: Tensor  # (d_in,)
    tokens: int

    def dense(self) -> Tensor:
        return (self.U * self.values) @ self.U.mT + torch.diag(self.rest)

    def trace(self) -> Tensor:
        """The inputs' mean square length."""
        return self.U.square().sum(0) @ self.values + self.rest.sum()

    def low_rank(self, k: int = RANK) -> "SketchedInputs":
        """With at most `k` columns; what the others hold of the diagonal goes to the rest."""
        rest = self.rest + self.U[:, k:].square() @ self.values[k:]
        return SketchedInputs(self.U[:, :k], self.values[:k], rest, self.tokens)


class StoredInputs(NamedTuple):
    """A sketch whose directions are read from their file whenever it is asked for something."""

    U: Factor  # (d_in, k)
    values: Tensor  # l (k,)
    rest: Tensor  # (d_in,)
    tokens: int

    def sketch(self) -> SketchedInputs:
        return SketchedInputs(in_memory(self.U).float(), self.values, self.rest, self.tokens)

    def dense(self) -> Tensor:
        return self.sketch().dense()

    def trace(self) -> Tensor:
        """The inputs' mean square length."""
        return self.sketch().trace()

    def low_rank(self, k: int = RANK) -> SketchedInputs:
        return self.sketch().low_rank(k)


InputStatistics: TypeAlias = DenseInputs | SketchedInputs | StoredInputs
Solve: TypeAlias = Callable[[str, Mapping[str, InputStatistics]], LoraFactors]


class DenseMoment:
    """`sum x x^T` of all inputs so far."""

    def __init__(self, d: int, device: torch.device):
        self.total, self.tokens = torch.zeros(d, d, device=device), 0

    def add(self, X: Tensor) -> None:
        """X is (tokens, d)."""
        self.total.addmm_(X.mT, X)
        self.tokens += len(X)

    def mean(self) -> DenseInputs:
        return DenseInputs((self.total / max(1, self.tokens)).cpu(), self.tokens)


class SketchedMoment:
    """The largest directions of `sum x x^T`, and its diagonal, in memory linear in d.

    `2 k` directions are kept from batch to batch: the leading right singular vectors of those so far, times
    their singular values, stacked on the batch.  At the end they give `k`.
    """

    def __init__(self, d: int, k: int, device: torch.device):
        self.k, self.tokens = k, 0
        self.kept = torch.zeros(0, d, device=device)  # S V^T
        self.diagonal = torch.zeros(d, device=device)

    def add(self, X: Tensor) -> None:
        """X is (tokens, d)."""
        self.diagonal += X.square().sum(0)
        self.tokens += len(X)
        stacked = torch.cat([self.kept, X])
        if len(stacked) > 2 * self.k:
            _, S, Vh = leading_triplets(stacked, 2 * self.k, seed=0)
            stacked = S[:, None] * Vh
        self.kept = stacked

    def mean(self) -> SketchedInputs:
        _, S, Vh = torch.linalg.svd(self.kept.double(), full_matrices=False)
        values, U = S[: self.k].square(), Vh[: self.k].mT
        rest = (self.diagonal.double() - U.square() @ values).clamp(min=0)
        n = max(1, self.tokens)
        return SketchedInputs(
            U.float().cpu().contiguous(), (values / n).float().cpu(), (rest / n).float().cpu(), self.tokens
        )


class CountedMoment:
    """`sum x x^T` of an embedding's inputs: each is a unit vector, and `C` the diagonal of their shares."""

    def __init__(self, d: int, device: torch.device):
        self.counts = torch.zeros(d, device=device)

    def add(self, ids: Tensor) -> None:
        """ids is (tokens,)."""
        self.counts += torch.bincount(ids, minlength=len(self.counts))

    def mean(self) -> SketchedInputs:
        tokens = int(self.counts.sum())
        rest = (self.counts / max(1, tokens)).cpu()
        return SketchedInputs(rest.new_zeros(len(rest), 0), rest.new_zeros(0), rest, tokens)


Moment: TypeAlias = DenseMoment | SketchedMoment | CountedMoment


class Inputs:
    """Takes the moments of the inputs of layers by adapter, those of one input once.

    Layers that are given the very same tensor, such as query, key and value or gate and up, share its
    moments.
    """

    def __init__(self, singles: Singles, k: int = RANK, dense_up_to: int = DENSE_UP_TO, keep: bool = True):
        """keep: the moments of earlier inputs, besides those of the latest."""
        self.singles, self.k, self.dense_up_to, self.keep = singles, k, dense_up_to, keep
        self.moments: dict[tuple[str, str], Moment] = {}  # by adapter and owner
        self.owner: dict[str, str] = {}  # by tensor, the first tensor that had the same input
        self._input: Tensor | None = None
        self._owner = ""
        self._taken: set[str] = set()

    def take(self, layer: Layer, x: Tensor, batch: Batch) -> None:
        """
        Raises:
            InputError: an input is NaN or infinite.
        """
        if x is not self._input:
            self._input, self._owner, self._taken = x, layer.tensor, set()
            if not self.keep:
                self.moments.clear()
        self.owner[layer.tensor] = self._owner
        for name, part in batch.parts:
            if layer.tensor in self.singles.updates[name] and name not in self._taken:
                self._taken.add(name)
                self._moment(name, layer).add(self._inputs(layer, x, batch, name, part))

    @contextmanager
    def taken(self, batch: Batch, pace: Pace) -> Iterator[None]:
        """While this lasts, what passes through the model is this batch, and its inputs are taken."""
        with ExitStack() as stack:
            _listen(stack, self.singles, batch, pace, self.take)
            yield

    def of(self, name: str, tensor: str) -> InputStatistics:
        return self.moments[name, self.owner[tensor]].mean()

    def statistics(self) -> dict[str, dict[str, InputStatistics]]:
        """`{adapter: {tensor of the base: statistics}}`; tensors of one input have the same object.

        Raises:
            InputError: a tensor was not heard of.
        """
        _check_heard(self.singles, self.owner)
        means = {key: moment.mean() for key, moment in self.moments.items()}
        return {
            name: {
                tensor: means[name, self.owner[tensor]]
                for tensor in self.singles.updates[name]
                if tensor in self.owner and (name, self.owner[tensor]) in means
            }
            for name in self.singles.names
        }

    def _moment(self, name: str, layer: Layer) -> Moment:
        key = name, self._owner
        if key not in self.moments:
            d = self.singles.updates[name][layer.tensor].A.shape[1]
            if layer.embedding:
                self.moments[key] = CountedMoment(d, layer.device)
            elif d <= self.dense_up_to:
                self.moments[key] = DenseMoment(d, layer.device)
            else:
                self.moments[key] = SketchedMoment(d, self.k, layer.device)
        return self.moments[key]

    def _inputs(self, layer: Layer, x: Tensor, batch: Batch, name: str, part: slice) -> Tensor:
        """The inputs at tokens of one adapter's texts; of a layer that a router sends tokens to, all there
        are.
        """
        if layer.routed:
            X = x.flatten(0, -2)
        else:
            X = in_rows(layer, x, len(batch.ids))[part][batch.counts[part].to(x.device)]
        if layer.embedding:
            return X
        X = X.float()
        if not finite(X):
            raise InputError(
                f"{layer.tensor}: the model in {str(x.dtype).removeprefix('torch.')} with {name} gives this "
                "layer inputs that are NaN or infinite; load it in float32, or check the adapter"
            )
        return X


def input_statistics(
    singles: Singles,
    texts: Texts,
    k: int = RANK,
    dense_up_to: int = DENSE_UP_TO,
    batch_tokens: int = BATCH_TOKENS,
    progress: Progress = silent,
) -> dict[str, dict[str, InputStatistics]]:
    """Moments of the inputs of every tensor that an adapter changes, while it reads its own texts.

    All adapters go through the model side by side, in as many passes as there are batches.  Padding does not
    count.

    Args:
        singles: the model and its adapters
        texts: by adapter
        k: columns of a sketch
        dense_up_to: the largest d_in whose matrix is kept whole; larger ones become sketches
        batch_tokens: in a pass; more of them need more memory, and fewer readings of a streamed base

    Returns:
        `{adapter: {tensor of the base: statistics}}`; tensors of one input have the same object.

    Raises:
        InputError: an input is NaN or infinite, or an adapter has no texts.
    """
    inputs = Inputs(singles, k, dense_up_to)
    batches = singles.batches(texts, batch_tokens)
    pace = Pace("inputs", sum(len(batch.examples) for batch in batches), progress)
    for batch in batches:
        with singles.alone(batch.parts), inputs.taken(batch, pace):
            singles.read(batch)
        pace.finished(len(batch.examples))
    return inputs.statistics()


def _check_heard(singles: Singles, heard: Mapping[str, str]) -> None:
    """
    Raises:
        InputError: the model does not multiply with a tensor, or with any expert, in a way that can be heard.
    """
    silent = [layer for layer in singles.layers.values() if layer.tensor not in heard]
    routed = [layer for layer in singles.layers.values() if layer.routed]
    for layer in silent:
        if not layer.routed or not any(expert.tensor in heard for expert in routed):
            raise InputError(
                f"{layer.tensor}: the model multiplies with it in a way that cannot be followed; methods "
                "that use examples cannot merge it"
            )


def merge_in_order(
    singles: Singles,
    texts: Texts,
    solve: Solve,
    k: int = RANK,
    dense_up_to: int = DENSE_UP_TO,
    progress: Progress = silent,
) -> dict[str, LoraFactors]:
    """RegMean++: merge layer by layer, on the inputs that the model merged below a layer gives it, in one
    pass.

    All texts are one batch.  When it comes to a layer, its inputs are taken by adapter, the layer's tensor is
    merged, and its answers have the merged update already.
    Only factors are merged here: what adapters trained directly takes no part.

    Nguyen et al., RegMean++, 2025 (arXiv 2508.03121).

    Args:
        singles: the model and its adapters
        texts: by adapter; all their tokens are in memory at once
        solve: from a tensor's name and the statistics of the adapters that change it, in their order, to the
            merged update in the base's orientation.  A factor lambda that it applies acts on the layers
            above, too
        k: columns of a sketch
        dense_up_to: the largest d_in whose matrix is kept whole

    Returns:
        the updates by tensor, in the order in which the model comes to them

    Raises:
        InputError: an input is NaN or infinite, or a layer sees only tokens that a router sends to it.
    """
    if singles.routed:
        raise InputError("layers that a router sends tokens to cannot be merged in one pass; use regmean")
    singles.batches(texts)  # refuses what has no texts
    batch = Batch.of((name, example) for name in singles.names for example in texts[name] if example.tokens)
    inputs = Inputs(singles, k, dense_up_to, keep=False)
    merged: dict[str, LoraFactors] = {}
    added: dict[str, Parts] = {}

    def merge(layer: Layer, x: Tensor, batch: Batch) -> None:
        inputs.take(layer, x, batch)
        names = [name for name in singles.names if layer.tensor in singles.updates[name]]
        merged[layer.tensor] = solve(layer.tensor, {name: inputs.of(name, layer.tensor) for name in names})
        added[layer.tensor] = [(EVERYTHING, Update.of(merged[layer.tensor], layer))]

    with ExitStack() as stack:
        stack.enter_context(beside(singles.layers.values(), added, len(batch.ids)))
        _listen(stack, singles, batch, Pace("merging", len(batch.examples), progress), merge)
        singles.read(batch)
    return merged


def _listen(
    stack: ExitStack,
    singles: Singles,
    batch: Batch,
    pace: Pace,
    take: Callable[[Layer, Tensor, Batch], None],
) -> None:
    """Call `take` with the inputs of every adapted layer before it answers, until the stack is closed."""

    def hook_of(layer: Layer, share: float) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hear(_module: nn.Module, args: tuple[Any, ...]) -> None:
            pace.at(batch.names, len(batch.examples), layer.tensor.removesuffix(".weight"), share)
            take(layer, args[0], batch)

        return hear

    for position, layer in enumerate(singles.layers.values()):
        hook = hook_of(layer, position / len(singles.layers))
        stack.callback(layer.module.register_forward_pre_hook(hook).remove)
