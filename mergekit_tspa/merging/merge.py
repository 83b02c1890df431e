"""From a plan to merged updates: load the factors, take statistics, merge, and check what comes out."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple, TypeAlias, overload

import torch
from torch import Tensor

from mergekit_tspa.adapters import Adapter, ExtractedModule, log_alignment, log_kept
from mergekit_tspa.alignment.attention import SideGrams
from mergekit_tspa.calibration.readings import Readings
from mergekit_tspa.errors import InputError
from mergekit_tspa.linalg import finite, product_overflows
from mergekit_tspa.merging.memory import budget
from mergekit_tspa.merging.outputs import TensorPlan
from mergekit_tspa.merging.pair_plans import load_side
from mergekit_tspa.merging.plan import Chunk, MergePlan, Variation
from mergekit_tspa.methods.inputs import Pair, Parameters, Progress, Survey, TensorInputs, silent
from mergekit_tspa.methods.method import Method, prepared
from mergekit_tspa.methods.report import Report, Truncation, summary
from mergekit_tspa.threads import in_threads
from mergekit_tspa.updates import Dense, LowRank, Spanned

LOG = logging.getLogger(__name__)
CHUNK_BYTES = 2**28  # of factors and solver, where a merge is one step of another
_WORK = 5  # times the size of its factors, what merging a tensor takes

Device: TypeAlias = torch.device | str | None
Updates: TypeAlias = dict[str, LowRank | Dense]  # by tensor


def merge_plan(
    plan: MergePlan, device: Device = None, progress: Progress = silent
) -> tuple[Updates, Sequence[Report | Truncation]]:
    """Merge everything in one batch.

    Returns:
        The update of every tensor that the method merges, and what its solvers report.

    Raises:
        InputError: an update is too large for float32, or a merged one is not finite.
    """
    updates, reports = next(merge_chunks(plan, [plan.whole], device, progress))
    return updates, reports


def merge_chunks(
    plan: MergePlan,
    chunks: Sequence[Chunk],
    device: Device = None,
    progress: Progress = silent,
    readings: Readings | None = None,
) -> Iterator[tuple[Updates, Sequence[Report | Truncation]]]:
    """The updates and reports of each chunk, one after the other.

    Args:
        readings: of the plan's texts, if they were begun already
    """
    survey = survey_plan(plan, device, progress, readings)
    for before, chunk in enumerate(chunks):

        def share(stage: str, done: float, left: float | None = None, before: int = before) -> None:
            progress(stage, (before + done) / len(chunks), left)

        sides = [(pair, side) for pair in chunk.pairs for side in (pair.x, pair.y)]
        assert plan.read is not None or not sides  # `plan_merge` refuses pairs without a base
        grams = [load_side(pair, side, plan.read, device) for pair, side in sides] if plan.read else []
        updates, reports = merge_chunk(plan.method, chunk, grams, survey, device, share)
        yield dict(zip((tensor.name for tensor in chunk.tensors), updates)), reports


def merge_chunk(
    method: Method,
    chunk: Chunk,
    grams: Sequence[SideGrams],
    survey: Survey | None = None,
    device: Device = None,
    progress: Progress = silent,
) -> tuple[list[LowRank | Dense], Sequence[Report | Truncation]]:
    """Load the factors of a chunk, merge them, cut them to `rank`, and check that they are finite.

    Args:
        grams: of the chunk's pairs, side x then side y of each
    """
    reports: Sequence[Report | Truncation] = ()
    if method.tensor_by_tensor:
        sized = _tensor_by_tensor(method, chunk, survey, device, progress)
    else:
        inputs = [load_tensor(method, plan, device)._replace(survey=survey) for plan in chunk.tensors]
        pairs = [Pair(*parts) for parts in zip(chunk.pairs, grams[::2], grams[1::2])]
        merged = method.merge([w for w in inputs if w.factors], pairs, progress)
        made, reports = iter(merged.updates), merged.reports
        sized = [
            _sized(method, plan, w, next(made) if w.factors else None, device)
            for plan, w in zip(chunk.tensors, inputs)
        ]
    _warn_of_zeros(chunk.tensors, [present for *_, present in sized])
    kept = {plan.name: share for plan, (_, share, _) in zip(chunk.tensors, sized) if share is not None}
    return [update for update, *_ in sized], [*reports, Truncation(kept)] if kept else reports


def _tensor_by_tensor(
    method: Method, chunk: Chunk, survey: Survey | None, device: Device, progress: Progress
) -> "list[_Sized]":
    """Every tensor from its file to its update, several of them at the same time."""

    def merge_one(plan: TensorPlan) -> "_Sized":
        w = load_tensor(method, plan, device)._replace(survey=survey)
        update = method.merge([w], [], silent).updates[0] if w.factors else None
        return _sized(method, plan, w, update, device)

    def done(count: int) -> None:
        if len(chunk.tensors) > 1:
            progress("merging", count / len(chunk.tensors), None)

    on_cpu = torch.device(device or torch.get_default_device()).type == "cpu"
    largest = max((_WORK * plan.nbytes for plan in chunk.tensors), default=1)
    at_once = max(1, budget() // largest) if on_cpu else 1
    # The largest first, so that no thread is left alone with one at the end.
    order = sorted(range(len(chunk.tensors)), key=lambda i: -chunk.tensors[i].nbytes)
    merged = in_threads(merge_one, [chunk.tensors[i] for i in order], at_once, done)
    placed = dict(zip(order, merged))
    return [placed[i] for i in range(len(order))]


class _Sized(NamedTuple):
    """A merged update as it leaves a chunk."""

    update: LowRank | Dense
    share: float | None  # of ||dW||^2 that `rank` left; None if it cut nothing
    present: Sequence[Adapter]  # those that took part


def _sized(
    method: Method,
    plan: TensorPlan,
    w: TensorInputs,
    made: LowRank | Spanned | Dense | None,
    device: Device,
) -> _Sized:
    """What was made of a tensor, cut to `rank`; zero if nothing was.

    Raises:
        InputError: it is not finite.
    """
    update = _zero(plan, device) if made is None else made
    rank, share = plan.parameters.rank, None
    try:
        if rank and (rank < update.rank or isinstance(update, Dense)):
            whole = update.spanned() if isinstance(update, LowRank) else update
            cut, norm = whole.truncated(rank), whole.norm()
            update, share = cut, (cut.norm() / norm).item() ** 2 if norm else 1.0
        elif isinstance(update, Spanned):
            update = update.low_rank()
        bounded = _bounded(update)
    except torch.linalg.LinAlgError:  # which values that are not finite end in
        bounded = False
    if not bounded or isinstance(update, Spanned):
        names = ", ".join(adapter.name for adapter, _ in plan.sources)
        raise InputError(f"{method.name}: the merged update of {plan.name} is not finite (adapters {names})")
    return _Sized(update, share, w.adapters)


def survey_plan(
    plan: MergePlan, device: Device = None, progress: Progress = silent, readings: Readings | None = None
) -> Survey | None:
    """What the method knows of all tensors before it merges the first, or None if it wants nothing.

    Args:
        readings: of the plan's texts, if they were begun already

    Raises:
        InputError: a file of texts is wrong, or the base is no model that reads them.
    """
    if not plan.surveys:
        return None
    if plan.method.guided and plan.guide and plan.tensors:
        begun = readings is not None
        readings = readings or plan.guide.readings(plan.tensors, device, progress)
        readings.merged_by = partial(_merged_by, plan, device, progress, readings)
        own = readings.base.own_name
        with _memory_is_told():
            found = plan.method.guided(_Loaded(plan, device, own), readings)
        names = {own(tensor.name): tensor.name for tensor in plan.tensors}
        found = {names.get(name, name): values for name, values in found.items()}
        for warning in () if begun else readings.warnings:
            LOG.warning("%s", warning)
        return found
    if plan.method.survey is None:
        return None
    return plan.method.survey(
        lambda: (
            prepared(w)
            for w in (load_tensor(plan.method, tensor, device) for tensor in plan.tensors)
            if w.factors
        )
    )


class _Loaded(Sequence[TensorInputs]):
    """The tensors of a plan whose updates are not all zero, read from files whenever they are asked for.

    Args:
        own: the name of a tensor in the model that reads the texts
    """

    def __init__(self, plan: MergePlan, device: Device, own: Callable[[str], str]):
        self._load = partial(load_tensor, plan.method, device=device)
        self._own = own
        self._plans = [tensor for tensor in plan.tensors if self._load(tensor).factors]

    def __len__(self) -> int:
        return len(self._plans)

    @overload
    def __getitem__(self, at: int) -> TensorInputs: ...

    @overload
    def __getitem__(self, at: slice) -> list[TensorInputs]: ...

    def __getitem__(self, at: int | slice) -> TensorInputs | list[TensorInputs]:
        if isinstance(at, slice):
            return [self[i] for i in range(len(self))[at]]
        w = self._load(self._plans[at])
        return w._replace(name=self._own(w.name))


def _merged_by(
    plan: MergePlan,
    device: Device,
    progress: Progress,
    readings: Readings,
    method: Method,
    parameters: Parameters,
) -> Iterator[tuple[str, LowRank | Dense]]:
    """What another method makes of the plan's adapters, tensor by tensor."""
    assert plan.again is not None
    other = plan.again(Variation(method, parameters))
    for updates, _ in merge_chunks(other, [*other.chunks(CHUNK_BYTES)], device, progress, readings):
        yield from ((readings.base.own_name(tensor), update) for tensor, update in updates.items())


@contextmanager
def _memory_is_told() -> Iterator[None]:
    """
    Raises:
        InputError: the memory does not suffice for the base and the texts.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # Allocators of CPUs raise a plain RuntimeError; torch.OutOfMemoryError is a RuntimeError, too.
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "allocate memory" not in str(
            error
        ):
            raise
        raise InputError(
            "there is not enough memory to read the texts: give fewer or shorter ones, lower batch_tokens, "
            "or lower memory, so that the base is streamed from disk"
        ) from error


def record_tensor(
    method: Method, plan: TensorPlan, survey: Survey | None = None, device: Device = None
) -> Mapping[str, Tensor]:
    """What a method keeps of a tensor beside the model, and as `tasks` whose it is; nothing if all updates
    are zero.
    """
    w = load_tensor(method, plan, device)._replace(survey=survey)
    if not w.factors or method.record is None:
        return {}
    adapters = [adapter for adapter, _ in plan.sources]
    tasks = torch.tensor([adapters.index(adapter) for adapter in w.adapters])
    return {"tasks": tasks, **method.record(w)}


def load_tensor(method: Method, plan: TensorPlan, device: Device) -> TensorInputs:
    """Load the factors of a tensor in float32, without adapters whose update is zero.

    Raises:
        InputError: an adapter's update, its scale included, is too large for float32.
    """
    loaded = [
        (adapter.factors(module, device=device), weight, adapter)
        for (adapter, module), weight in zip(plan.sources, plan.weights)
    ]
    for (adapter, module), (f, *_) in zip(plan.sources, loaded):
        if product_overflows(f, f.rank):
            raise InputError(
                f"{adapter.name}: its update of {module}, scale included, is too large for float32"
            )
    if method.drops_zeros:
        loaded = [part for part in loaded if part[0].B.any() and part[0].A.any()]
    return TensorInputs(
        plan.name,
        factors=[factors for factors, _, _ in loaded],
        weights=[weight for _, weight, _ in loaded],
        parameters=plan.parameters,
        adapters=[adapter for _, _, adapter in loaded],
        transposed=any(module.transposed for module in plan.modules),
    )


def log_merge(reports: Sequence[Report | Truncation], adapters: Sequence[Adapter]) -> None:
    """Say what the solvers did, and what of updates and full models was left out."""
    for report in summary(reports):
        LOG.log(logging.WARNING if isinstance(report, Truncation) else logging.INFO, "%s", report)
    for adapter in adapters:
        if adapter.aligned is not None:
            log_alignment(adapter.aligned)
        log_kept(adapter)


def _bounded(update: LowRank | Dense) -> bool:
    """Whether no entry of it is NaN, or infinite, or could become so when its factors are multiplied."""
    return finite(*update) and (isinstance(update, Dense) or not product_overflows(update, update.rank))


def _warn_of_zeros(plans: Sequence[TensorPlan], present: Sequence[Sequence[Adapter]]) -> None:
    dropped: dict[Adapter, list[str]] = {}
    for plan, adapters in zip(plans, present):
        for adapter, module in plan.sources:
            # A full model may well leave most tensors as they are; log_kept counts them.
            if adapter not in adapters and not isinstance(adapter.modules[module], ExtractedModule):
                dropped.setdefault(adapter, []).append(plan.name)
    for adapter, names in dropped.items():
        LOG.warning(
            "%s: its update of %d weights is zero, %s among them; it takes no part there",
            adapter.name,
            len(names),
            names[0],
        )


def _zero(plan: TensorPlan, device: Device) -> LowRank:
    d_out, d_in = plan.shape
    return LowRank(torch.zeros(d_out, 1, device=device), torch.zeros(1, d_in, device=device))
