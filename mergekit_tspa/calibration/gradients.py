"""How much each adapter's loss depends on the entries of a tensor: `F = mean (dL/dW)^2` over texts.

`L` is the mean loss of a text's answer while the model reads it with its own adapter, and `W` the tensor
that the adapter changes, whose gradient is `G = sum_tokens g x^T` with the input `x` of a token and the
gradient `g` of its answer.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mergekit_tspa.calibration.batches import Batch, Texts
from mergekit_tspa.calibration.layers import Layer, Progress, frozen, in_rows, silent
from mergekit_tspa.calibration.score import answer_logits
from mergekit_tspa.calibration.singles import BATCH_TOKENS, Pace, Singles
from mergekit_tspa.errors import InputError


class SquaredGradient(NamedTuple):
    """`F` itself, or its rank-one form from its sides."""

    outputs: Tensor  # mean over tokens of g_i^2  # (d_out,)
    inputs: Tensor  # mean over tokens of x_j^2  # (d_in,)
    F: Tensor | None = None  # mean over texts of G^2, where it was asked for  # (d_out, d_in)


class _Sums:
    """Of one adapter and tensor, over the texts so far."""

    def __init__(self) -> None:
        self.outputs: Any = 0.0
        self.inputs: Any = 0.0
        self.F: Any = 0.0
        self.tokens = self.texts = 0

    def add(self, x: Tensor, g: Tensor, exact: bool) -> None:
        """x is (tokens, d_in) and g (tokens, d_out) of one text."""
        self.outputs = self.outputs + g.square().sum(0)
        self.inputs = self.inputs + x.square().sum(0)
        self.tokens, self.texts = self.tokens + len(x), self.texts + 1
        if exact:
            self.F = self.F + (g.mT @ x).square()

    def mean(self, exact: bool) -> SquaredGradient:
        F = (self.F / self.texts).cpu() if exact else None
        return SquaredGradient((self.outputs / self.tokens).cpu(), (self.inputs / self.tokens).cpu(), F)


def squared_gradients(
    singles: Singles,
    texts: Texts,
    exact: bool,
    batch_tokens: int = BATCH_TOKENS,
    progress: Progress = silent,
) -> dict[str, dict[str, SquaredGradient]]:
    """`F` of every tensor that an adapter changes, on its own texts.

    Args:
        singles: the model, not streamed, and its adapters
        texts: by adapter, with answers
        exact: keep the whole of `F`, as many numbers as the tensors have, for each adapter
        batch_tokens: in a pass

    Returns:
        `{adapter: {tensor of the base: its squared gradient}}`, in the orientation of the layer

    Raises:
        InputError: the base is streamed, a tensor is an embedding or sees only tokens that a router sends
            to it, or an adapter has no text with an answer.
    """
    if any(parameter.is_meta for parameter in singles.model.parameters()):
        raise InputError("fisher needs the whole base in memory, not streamed from disk: give more memory")
    for layer in singles.layers.values():
        if layer.embedding or layer.routed:
            raise InputError(f"{layer.tensor}: fisher takes linear layers that see all tokens only")
    answered = {name: [example for example in own if example.answer_tokens] for name, own in texts.items()}
    sums: dict[str, dict[str, _Sums]] = {name: {} for name in singles.names}
    batches = singles.batches(answered, batch_tokens)
    pace = Pace("gradients", sum(len(batch.examples) for batch in batches), progress)
    for batch in batches:
        seen: dict[str, tuple[Tensor, Tensor]] = {}
        with torch.enable_grad(), frozen(singles.model), singles.alone(batch.parts), ExitStack() as stack:
            for layer in singles.layers.values():
                stack.callback(layer.module.register_forward_hook(_watch(layer, seen)).remove)
            loss = _loss(singles, batch)
            gradients = torch.autograd.grad(loss, [y for _, y in seen.values()], allow_unused=True)
        for (tensor, (x, _)), g in zip(seen.items(), gradients):
            if g is not None:
                _add(sums, singles, batch, singles.layers[tensor], x, g, exact)
        pace.finished(len(batch.examples))
        pace.at(batch.names, 0)
    return {name: {tensor: found.mean(exact) for tensor, found in own.items()} for name, own in sums.items()}


def _watch(layer: Layer, seen: dict[str, tuple[Tensor, Tensor]]) -> Any:
    """Keep what a layer is given, and its answer as something that a gradient can be taken by."""

    def watch(_module: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor:
        y = y if y.requires_grad else y.detach().requires_grad_(True)
        seen[layer.tensor] = args[0].detach(), y
        return y

    return watch


def _loss(singles: Singles, batch: Batch) -> Tensor:
    """The sum over texts of the mean loss of each text's answer."""
    logits = answer_logits(singles, batch)
    ids = torch.tensor([t for example in batch.examples for t in example.tokens[example.start :]])
    losses = torch.nn.functional.cross_entropy(logits, ids.to(logits.device), reduction="none")
    shares = [torch.full((e.answer_tokens,), 1 / e.answer_tokens) for e in batch.examples]
    return losses @ torch.cat(shares).to(losses)


def _add(
    sums: Mapping[str, dict[str, _Sums]],
    singles: Singles,
    batch: Batch,
    layer: Layer,
    x: Tensor,
    g: Tensor,
    exact: bool,
) -> None:
    """Add the texts of a batch, each to its own adapter's sums."""
    X, G = in_rows(layer, x, len(batch.ids)).float(), in_rows(layer, g, len(batch.ids), answer=True).float()
    for name, part in batch.parts:
        if layer.tensor not in singles.updates[name]:
            continue
        own = sums[name].setdefault(layer.tensor, _Sums())
        for row in range(part.start, part.stop):
            counts = batch.counts[row].to(X.device)
            own.add(X[row][counts], G[row][counts], exact)
