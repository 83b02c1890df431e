"""Jobs as tasks of Ray. No other file of the package imports Ray, which is the extra `ray`.

A state is kept in the worker process that made it. Ray gives a task to a process that is there already
where it can, and runs it again elsewhere where a process or machine is lost.
"""

import logging
import os
import socket
import warnings
from collections.abc import Mapping
from types import ModuleType
from typing import Any, NamedTuple
from uuid import uuid4

import torch
from torch import Tensor

from mergekit_tspa.errors import InputError, reason_of
from mergekit_tspa.jobs.pool import (
    OUT_OF_MEMORY,
    Outcome,
    Pool,
    Setup,
    Shared,
    Work,
    attempt,
    explained,
    refuse_none,
)

RETRIES = 3  # times that a job is given to another worker
SECONDS = 5  # in which the head of a cluster must answer


class Program(NamedTuple):
    """What all jobs of a pool have in common."""

    name: str
    work: Work
    setup: Setup
    directory: str
    cpus: int
    gpus: int


class Packed(NamedTuple):
    """A tensor as Ray stores it: numpy does not know all of torch's types, so its bytes alone."""

    data: Any
    dtype: torch.dtype
    shape: torch.Size


class RayPool:
    """Does jobs on a cluster. Its arguments are those of `open_pool`."""

    def __init__(self, work: Work, setup: Setup, shared: Shared, address: str, cpus: int, gpus: int | None):
        self._ray = ray = _imported()
        self._joined = not ray.is_initialized()
        self._running: dict[Any, Any] = {}  # keys of jobs, by the reference of their result
        if self._joined:
            _join(ray, address)
        try:
            if gpus is None:
                gpus = int(any(node.get("GPU", 0) >= 1 for node in self._nodes()))
            self._cpus, self._gpus = cpus, gpus
            self._refuse_too_much()
            self._program = ray.put(Program(uuid4().hex, work, setup, os.getcwd(), cpus, gpus))
            self._shared = ray.put(None if shared is None else packed(shared))
            self._task = ray.remote(_do).options(num_cpus=cpus, num_gpus=gpus, max_retries=RETRIES)
        except BaseException:
            self.__exit__()
            raise

    def _nodes(self) -> list[dict[str, float]]:
        """What each machine has that is there now."""
        return [node["Resources"] for node in self._ray.nodes() if node["Alive"]]

    def _fitting(self) -> int:
        """How many jobs can run at once on the machines that are there now."""

        def on(node: dict[str, float]) -> int:
            jobs = node.get("CPU", 0) // self._cpus
            return int(min(jobs, node.get("GPU", 0) // self._gpus) if self._gpus else jobs)

        return sum(map(on, self._nodes()))

    def _refuse_too_much(self) -> None:
        if not self._fitting():
            gpus = f" and {self._gpus} GPUs" if self._gpus else ""
            raise InputError(
                f"no machine of the Ray cluster has {self._cpus} cores{gpus} for one job; ask for fewer, "
                "or let a larger machine join"
            )

    @property
    def capacity(self) -> int:
        return max(1, self._fitting())

    def submit(self, key: Any, job: Any) -> None:
        self._running[self._task.remote(self._program, self._shared, key, job)] = key

    def wait(self) -> Outcome:
        refuse_none(self._running)
        (done, *_), _ = self._ray.wait(list(self._running), num_returns=1)
        key = self._running.pop(done)
        try:
            outcome: Outcome = self._ray.get(done)
            return outcome
        except self._ray.exceptions.RayError as error:
            return Outcome(key, None, self._explained(error), None)

    def _explained(self, error: Exception) -> str:
        """Why Ray has no result of a job."""
        known = self._ray.exceptions
        if isinstance(error, known.RayTaskError) and isinstance(error.cause, Exception):
            return explained(error.cause)
        if isinstance(error, known.OutOfMemoryError):
            return OUT_OF_MEMORY
        if isinstance(error, known.WorkerCrashedError | known.NodeDiedError):
            return (
                f"its worker died {1 + RETRIES} times, perhaps for want of memory; try this job alone, "
                "without Ray"
            )
        return explained(error)

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *error: object) -> None:
        for result in self._running:
            self._ray.cancel(result, force=True)
        self._running.clear()
        if self._joined:
            self._ray.shutdown()


def _imported() -> ModuleType:
    """
    Raises:
        InputError: Ray is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # By default a job that is too large for its machine would be tried for ever.
    os.environ.setdefault("RAY_task_oom_retries", str(RETRIES))
    try:
        import ray
    except ImportError as error:
        raise InputError("Ray is not installed; run pip install 'mergekit-tspa[ray]'") from error
    return ray


def _join(ray: ModuleType, address: str) -> None:
    """
    Raises:
        InputError: there is no cluster at the address, or Ray does not start.
    """
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    if address not in ("auto", "local"):
        _refuse_unreachable(address)
    options: dict[str, Any] = {"include_dashboard": False}
    if address != "local":  # whose machines may have been started with another environment
        path = os.environ.get("PYTHONPATH")
        options = {"runtime_env": {"env_vars": {"PYTHONPATH": path}}} if path else {}
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **options)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise InputError(
            f"Ray at {address} cannot be joined ({reason_of(error)}); see `ray status`, or use this "
            "machine alone"
        ) from error


def _refuse_unreachable(address: str) -> None:
    """Ray itself would try for minutes.

    Raises:
        InputError: nobody answers there.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or "/" in host:
        raise InputError(
            f"{address!r} is no address of a Ray cluster; give HOST:PORT, as `ray start --head` prints it, "
            "or auto"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), SECONDS).close()
    except (OSError, OverflowError, UnicodeError) as error:
        raise InputError(
            f"no Ray cluster answers at {address} ({error}); start one with `ray start --head`, or give the "
            "address that it prints"
        ) from error


def packed(tensors: Mapping[str, Tensor]) -> dict[str, Packed]:
    """Tensors as Ray stores them without pickling: what a worker gets of it lies in the memory of its
    machine's store.
    """
    return {name: _pack(tensor.detach()) for name, tensor in tensors.items()}


def _pack(tensor: Tensor) -> Packed:
    data = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return Packed(data, tensor.dtype, tensor.shape)


def unpacked(stored: Mapping[str, Packed]) -> dict[str, Tensor]:
    """The same tensors in the same memory, which is read-only."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return {
            name: torch.from_numpy(data).view(dtype).view(shape)
            for name, (data, dtype, shape) in stored.items()
        }


_states: dict[str, Any] = {}  # of this worker process, by the name of its pool; the last one only


def _do(program: Program, shared: dict[str, Packed] | None, key: Any, job: Any) -> Outcome:
    """One job, in a worker process."""

    def state() -> Any:
        if program.name not in _states:
            _states.clear()
            _enter(program.directory)
            torch.set_num_threads(program.cpus)
            if not program.gpus:  # some versions of Ray leave all of them in sight
                os.environ["CUDA_VISIBLE_DEVICES"] = ""
            _states[program.name] = program.setup(None if shared is None else unpacked(shared))
        return _states[program.name]

    return attempt(program.work, state, key, job)


def _enter(directory: str) -> None:
    """
    Raises:
        InputError: this machine does not have the directory in which the pool was opened.
    """
    try:
        os.chdir(directory)
    except OSError as error:
        raise InputError(
            f"{socket.gethostname()}: {directory} is not there, in which paths begin; share it between the "
            "machines of the cluster"
        ) from error
