"""A merge as a value: which tensors, whose factors, which weights, which attention pairs.

A `MergePlan` is made once, from a recipe or from a call in Python, before a factor is loaded.  What is done
with it are functions: `merging.merge` loads, surveys and merges, `merging.finish` applies the updates to the
base's tensors, `merging.servable` says what of it can be an adapter.
"""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple, TypeAlias

from torch import Tensor

from mergekit_tspa.adapters import Adapter
from mergekit_tspa.base.geometry import AttentionGeometry, in_attention
from mergekit_tspa.errors import InputError
from mergekit_tspa.merging.guide import Guide, check_guide
from mergekit_tspa.merging.outputs import OutputTensor, Part, TensorPlan, Wanted
from mergekit_tspa.merging.pair_plans import plan_pairs
from mergekit_tspa.methods.inputs import PairPlan, Parameters
from mergekit_tspa.methods.method import Method

LOG = logging.getLogger(__name__)

ReadTensor: TypeAlias = Callable[[str], Tensor]  # a tensor of the base, by its name in the output


class Unit(NamedTuple):
    """Tensors that must be merged together: one, or those of an attention block with their pairs."""

    tensors: tuple[TensorPlan, ...]
    pairs: tuple[PairPlan, ...]

    @property
    def nbytes(self) -> int:
        return sum(plan.nbytes for plan in self.tensors) + sum(pair.nbytes for pair in self.pairs)


Chunk: TypeAlias = Unit  # some units put together, to be solved in one batch


class Variation(NamedTuple):
    """What of a merge is to be something else, for all tensors."""

    method: Method
    parameters: Parameters
    weights: Mapping[Adapter, float] | None = None  # None: they stay
    guide: Guide | None = None  # None: it stays


@dataclass(frozen=True, eq=False)
class MergePlan:
    """Everything about a merge that is decided before a factor is loaded."""

    method: Method
    adapters: tuple[Adapter, ...]  # in the order of the recipe
    outputs: tuple[OutputTensor, ...]
    pairs: tuple[PairPlan, ...]
    read: ReadTensor | None  # None: no base is at hand
    guide: Guide | None = None  # what a method that looks at texts is given besides
    again: Callable[["Variation"], "MergePlan"] | None = None  # the same merge with something changed

    @cached_property
    def changed(self) -> dict[str, OutputTensor]:
        """The outputs that differ from the base."""
        return {output.name: output for output in self.outputs if output.parts}

    @cached_property
    def every(self) -> tuple[TensorPlan, ...]:
        """All tensors that adapters change, in whatever way."""
        return tuple(part.plan for output in self.outputs for part in output.parts)

    @cached_property
    def tensors(self) -> tuple[TensorPlan, ...]:
        """The tensors with low-rank updates, which the method merges."""
        return tuple({plan.name: plan for plan in self.every if plan.sources}.values())

    @property
    def surveys(self) -> bool:
        """Whether the method looks at all tensors, or at texts, before it merges the first."""
        return self.method.guided is not None or self._scoped

    @property
    def _scoped(self) -> bool:
        return self.method.survey is not None and any(
            plan.parameters.scope == "model" for plan in self.tensors
        )

    def weights_of(self) -> dict[str, set[float]]:
        """The weights that each adapter has, by its name."""
        weights: dict[str, set[float]] = {}
        for plan in self.every:
            for (adapter, _), weight in zip(plan.sources, plan.weights):
                weights.setdefault(adapter.name, set()).add(weight)
        return weights

    def only(self, wanted: Callable[[str], bool]) -> "MergePlan":
        """The same merge of some of its tensors, by their names, with the pairs that have a tensor there."""
        outputs = tuple(
            output._replace(parts=tuple(part for part in output.parts if wanted(part.plan.name)))
            for output in self.outputs
        )
        pairs = tuple(pair for pair in self.pairs if wanted(pair.x.tensor) or wanted(pair.y.tensor))
        return replace(self, outputs=outputs, pairs=pairs)

    @property
    def whole(self) -> "Chunk":
        """All of it in one chunk."""
        return Unit(self.tensors, self.pairs)

    def units(self, order: Callable[[str], str] | None = None) -> list[Unit]:
        """The tensors grouped by attention block, sorted by `order(name)`, the recipe's order by default."""
        block_of = {side.tensor: pair.block for pair in self.pairs for side in (pair.x, pair.y)}
        plans = self.tensors if order is None else sorted(self.tensors, key=lambda plan: order(plan.name))
        tensors: dict[str, list[TensorPlan]] = {}
        for plan in plans:
            tensors.setdefault(block_of.get(plan.name, plan.name), []).append(plan)
        pairs: dict[str, list[PairPlan]] = {}
        for pair in self.pairs:
            pairs.setdefault(pair.block, []).append(pair)
        return [Unit(tuple(plans), tuple(pairs.get(block, ()))) for block, plans in tensors.items()]

    def chunks(self, budget: float = math.inf, order: Callable[[str], str] | None = None) -> Iterator[Chunk]:
        """Units put together up to `budget` bytes; a method with dense updates gets one tensor at a time."""
        chunk: list[Unit] = []
        size = 0
        for unit in self.units(order):
            if chunk and (self.method.result.dense or size + unit.nbytes > budget):
                yield _joined(chunk)
                chunk, size = [], 0
            chunk.append(unit)
            size += unit.nbytes
        if chunk:
            yield _joined(chunk)


def _joined(units: Sequence[Unit]) -> Chunk:
    tensors = tuple(plan for unit in units for plan in unit.tensors)
    return Chunk(tensors, tuple(pair for unit in units for pair in unit.pairs))


def plan_merge(
    method: Method,
    adapters: Sequence[Adapter],
    bases: Mapping[str, str],
    wanted: Iterable[Wanted],
    *,
    read: ReadTensor | None = None,
    shapes: Mapping[str, tuple[int, ...] | None] | None = None,
    geometry_of: Callable[[str], AttentionGeometry] | None = None,
    guide: Guide | None = None,
) -> MergePlan:
    """Decide everything about a merge, and refuse what cannot be done.

    Args:
        bases: `{tensor of the output: tensor of the base}`, in the order of the output
        wanted: what adapters do to them
        read: reads a tensor of the base by its name in the output
        shapes: of the output's tensors as far as they are known, for methods that look at attention products
        geometry_of: head counts of an attention block, for such methods
        guide: the base and the adapters' texts, for methods that look at texts

    Raises:
        InputError: a weight out of the method's range, updates of different shapes, a rank that nothing
            carries, parameters that contradict each other, an attention layout that is not known, no base
            where one is needed.
    """
    wanted = list(wanted)

    def again(change: Variation) -> MergePlan:
        return plan_merge(
            change.method,
            adapters,
            bases,
            [_changed(want, change) for want in wanted],
            read=read,
            shapes=shapes,
            geometry_of=geometry_of,
            guide=change.guide or guide,
        )

    parts: dict[str, list[Part]] = {name: [] for name in bases}
    unweighted = []
    for want in wanted:
        tensor = _plan_tensor(method, want)
        if tensor is not None:
            parts[want.output].append(Part(want.index, tensor))
        else:
            unweighted.append(want.output)
    if silent := [name for name in dict.fromkeys(unweighted) if not parts[name]]:
        named = f"{silent[0]} and {len(silent) - 1} more" if silent[1:] else silent[0]
        LOG.warning("%s: all weights are zero, so the base stays as it is", named)
    outputs = tuple(OutputTensor(name, base, tuple(parts[name])) for name, base in bases.items())
    plan = MergePlan(method, tuple(adapters), outputs, (), read, guide, again)
    _check(plan)
    if method.guided:
        check_guide(method, [*plan.changed.values()], guide)
    if not (
        method.attention and any(t.parameters.attention_steps and in_attention(t.name) for t in plan.tensors)
    ):
        return plan
    if read is None or shapes is None or geometry_of is None:
        raise InputError(f"{method.name} looks at attention products: give it the base model (base=)")
    return replace(plan, pairs=tuple(plan_pairs(plan.tensors, shapes, geometry_of)))


def _changed(want: Wanted, change: Variation) -> Wanted:
    want = want._replace(parameters=change.parameters)
    if change.weights is None:
        return want
    return want._replace(
        sources=[(adapter, module, change.weights[adapter]) for adapter, module, _ in want.sources],
        changes=[(adapter, own, change.weights[adapter]) for adapter, own, _ in want.changes],
    )


def _plan_tensor(method: Method, want: Wanted) -> TensorPlan | None:
    """Keep the adapters of non-zero weight; None when there is none."""
    for adapter, _, weight in (*want.sources, *want.changes):
        if not math.isfinite(weight) or weight < method.min_weight:
            raise InputError(
                f"{adapter.name}: weight {weight} for {want.name}: {method.name} takes finite weights"
                + (f" of at least {method.min_weight:g}" if math.isfinite(method.min_weight) else "")
            )
    sizes = {adapter.name: adapter.modules[module].shape for adapter, module, _ in want.sources}
    if len(set(sizes.values())) > 1:
        raise InputError(
            f"{want.name}: updates of different shapes {sizes}; the adapters belong to different bases"
        )
    sources = [(adapter, module) for adapter, module, weight in want.sources if weight]
    weights = [weight for _, _, weight in want.sources if weight]
    changes = [(change, weight) for _, change, weight in want.changes if weight]
    if not sources and not changes:
        return None
    return TensorPlan(want.name, sources, weights, want.parameters, changes)


def _check(plan: MergePlan) -> None:
    """What can be said of a whole merge before a factor is loaded.

    Raises:
        InputError: a `rank` that no tensor's merged update carries (those that carry less stay as they are),
            unequal ranks where the method needs equal ones, statistics over the model with parameters that
            vary.
    """
    method, tensors = plan.method, plan.tensors
    method.check([tensor.planned for tensor in tensors])
    carried = 0
    for tensor in tensors:
        if method.equal_ranks and len(set(tensor.ranks)) > 1:
            raise InputError(
                f"{tensor.name}: {method.name} needs adapters of equal rank, and these have {tensor.ranks}; "
                "use a method without that need (mergekit-tspa methods)"
            )
        carried = max(carried, method.carried(tensor.planned))
    asked = [tensor.parameters.rank for tensor in tensors if tensor.parameters.rank is not None]
    if len(asked) == len(tensors) and asked and min(asked) > carried:
        raise InputError(f"rank {min(asked)}: the merged updates carry rank {carried} at most; leave it out")
    if plan.surveys and any(tensor.parameters != tensors[0].parameters for tensor in tensors):
        raise InputError(
            f"{method.name}: {'scope: model' if plan._scoped else 'it'} needs the same parameters for all "
            "tensors; only weight may vary"
        )
    if method.elects and (mixed := next((t for t in tensors if min(t.weights) < 0 < max(t.weights)), None)):
        LOG.warning(
            "%s: weights of both signs (%s: %s): an adapter of negative weight votes, and counts, with the "
            "opposite of its update",
            method.name,
            mixed.name,
            ", ".join(f"{weight:g}" for weight in mixed.weights),
        )
