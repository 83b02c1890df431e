"""A pool takes jobs and gives their results: in this process, or on the machines of a Ray cluster."""

import logging
from collections import deque
from collections.abc import Callable, Mapping
from functools import cache
from time import perf_counter
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from mergekit_tspa.errors import InputError, reason_of

LOG = logging.getLogger(__name__)

Shared: TypeAlias = Mapping[str, Tensor] | None
Setup: TypeAlias = Callable[[Shared], Any]
Work: TypeAlias = Callable[[Any, Any], Any]

OUT_OF_MEMORY = "it ran out of memory; let fewer jobs run at once, or take a machine with more"


class Outcome(NamedTuple):
    """What came out of one job."""

    key: Any
    value: Any  # what the work returned; None if it failed
    error: str | None  # why it failed, in one line
    seconds: float | None  # that it took; None if its worker was lost


class Pool(Protocol):
    """Jobs go in with a key each and come out in whatever order they are done.

    A pool is a context. Jobs that are still running when it ends are given up.
    """

    @property
    def capacity(self) -> int:
        """How many jobs can run at once now, at least one."""

    def submit(self, key: Any, job: Any) -> None:
        """Give the pool a job. It may be more than `capacity`; the others wait."""

    def wait(self) -> Outcome:
        """The next job that is done.

        Raises:
            InputError: there is no job to wait for.
        """

    def __enter__(self) -> "Pool": ...

    def __exit__(self, *error: object) -> None: ...


def open_pool(
    work: Work,
    setup: Setup,
    shared: Shared = None,
    *,
    ray: str | None = None,
    cpus: int = 1,
    gpus: int | None = None,
) -> Pool:
    """A pool of workers that are all alike. An exception of a job is an outcome, and the pool goes on.

    Args:
        work: `work(state, job)` does one job. What it returns must be picklable.
        setup: `setup(shared)` makes the state, such as a loaded model, once per process that works. A job
            whose state cannot be made fails.
        shared: tensors that every state needs. On Ray they are kept once per machine, and workers see them
            there without a copy, on the CPU and read-only: writing to one would end the worker.
        ray: None does the jobs in this process, one after another, when `wait` is called. An address,
            `HOST:PORT` or `auto`, joins that Ray cluster. An empty string joins the one of `RAY_ADDRESS`,
            or starts Ray on this machine alone. A program that is connected to a cluster already uses that
            one. Functions must then be picklable, and jobs run in the
            directory in which the pool was opened. A job whose worker or machine is lost is given to another.
        cpus: cores per job on Ray, as many threads as torch gets there
        gpus: GPUs per job on Ray; by default one if the cluster has any. A worker sees only its own.

    Raises:
        InputError: Ray is not installed or not reached, or no machine has that many cores and GPUs.
    """
    if ray is None:
        return HerePool(work, setup, shared)
    from mergekit_tspa.jobs.on_ray import RayPool

    return RayPool(work, setup, shared, ray, cpus, gpus)


class HerePool:
    """Does jobs in this process, when their results are waited for."""

    capacity = 1

    def __init__(self, work: Work, setup: Setup, shared: Shared):
        self._work = work
        self._state = cache(lambda: setup(shared))
        self._jobs: deque[tuple[Any, Any]] = deque()

    def submit(self, key: Any, job: Any) -> None:
        self._jobs.append((key, job))

    def wait(self) -> Outcome:
        refuse_none(self._jobs)
        key, job = self._jobs.popleft()
        return attempt(self._work, self._state, key, job)

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *error: object) -> None:
        self._jobs.clear()


def refuse_none(jobs: Any) -> None:
    """
    Raises:
        InputError: there is no job to wait for.
    """
    if not jobs:
        raise InputError("no job is left to wait for; submit one first")


def attempt(work: Work, state: Callable[[], Any], key: Any, job: Any) -> Outcome:
    """Do one job."""
    start, value, error = perf_counter(), None, None
    try:
        value = work(state(), job)
    except Exception as failure:
        LOG.debug("a job failed", exc_info=failure)
        error = explained(failure)
    return Outcome(key, value, error, perf_counter() - start)


def explained(error: Exception) -> str:
    """Why a job failed, in one line."""
    if isinstance(error, InputError):
        return error.message
    no_memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
    if no_memory or "can't allocate memory" in str(error):  # as torch says on the CPU
        return OUT_OF_MEMORY
    name, reason = type(error).__name__, reason_of(error)
    return reason if reason == name else f"{name}: {reason}"
