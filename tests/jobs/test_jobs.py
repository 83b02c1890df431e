"""Jobs done here and on Ray: results, failures, shared tensors, and machines that are lost."""

import builtins
import os
import socket
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from mergekit_tspa import InputError
from mergekit_tspa.jobs.pool import OUT_OF_MEMORY, open_pool

SHARED = {
    "float32": torch.arange(300_000, dtype=torch.float32).view(3, -1),
    "bfloat16": torch.linspace(-1, 1, 300_000).to(torch.bfloat16),
    "turned": torch.arange(6.0).view(2, 3).T,
    "empty": torch.zeros(0, 4),
    "number": torch.tensor(7),
}


def count(shared):
    """A state that knows how often it was made, and where."""
    return {"shared": shared, "made": time.time_ns(), "process": os.getpid()}


def square(state, job):
    return job**2


def fail(state, job):
    """Fails as the job says."""
    if job == "input":
        raise InputError("the adapter is broken; save it again")
    if job == "memory":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    if job == "allocator":
        return torch.empty(2**60)
    if job == "lines":
        raise KeyError("first\nsecond")
    if job == "death":
        os._exit(1)
    if job == "unpicklable":
        return threading.Lock()
    return job


def tell(state, job):
    """The state and the process that has it."""
    return state["made"], state["process"], os.getpid(), os.getcwd(), torch.get_num_threads()


def look(state, job):
    """The shared tensors, and whether they lie in the memory of Ray's store."""
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    stores = [
        [int(end, 16) for end in line[0].split("-")] for line in maps if len(line) > 5 and "plasma" in line[5]
    ]
    inside = lambda t: any(a <= t.data_ptr() < b for a, b in stores)  # noqa: E731
    return {name: (tensor.clone(), inside(tensor)) for name, tensor in state["shared"].items()}


def linger(state, job):
    """Says that it is there, and stays until it may go."""
    import ray

    folder, number = job
    node = ray.get_runtime_context().get_node_id()
    (folder / f"{number}-{time.time_ns()}").write_text(node)
    until(lambda: (folder / "go").exists())
    return number, node


def until(happened, seconds=60):
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def nothing(shared):
    return None


def no_state(shared):
    raise InputError("no such model; name another")


def outcomes(pool, jobs):
    for key, job in enumerate(jobs):
        pool.submit(key, job)
    return {outcome.key: outcome for outcome in (pool.wait() for _ in jobs)}


@pytest.fixture(scope="module")
def cluster():
    """A Ray cluster of one machine with one core, to which machines are added."""
    pytest.importorskip("ray")
    import ray
    from ray.cluster_utils import Cluster

    # By default it takes 15 s until the loss of a machine counts.
    checks = {"health_check_period_ms": 500, "health_check_failure_threshold": 4}
    head = {"num_cpus": 1, "include_dashboard": False, "_system_config": checks}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture
def connected(cluster):
    """The same, with this process connected: its workers last, and importing torch in each takes seconds."""
    import ray

    if not ray.is_initialized():
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    return cluster.address


@pytest.fixture(params=["here", "ray"])
def address(request):
    """Of a pool: each test runs in this process and on Ray."""
    return None if request.param == "here" else request.getfixturevalue("connected")


def test_results(address):
    with open_pool(square, nothing, ray=address) as pool:
        assert {k: o[1:3] for k, o in outcomes(pool, [3, 4, 5]).items()} == {
            0: (9, None),
            1: (16, None),
            2: (25, None),
        }
        assert pool.capacity == 1
        with pytest.raises(InputError, match="no job is left"):
            pool.wait()


def test_a_job_that_fails(address):
    jobs = ["input", "memory", "allocator", "lines", "fine"]
    with open_pool(fail, nothing, ray=address) as pool:
        found = outcomes(pool, jobs)
    assert [found[i].error for i in range(len(jobs))] == [
        "the adapter is broken; save it again",
        OUT_OF_MEMORY,
        OUT_OF_MEMORY,
        found[3].error,
        None,
    ]
    assert found[3].error.startswith("KeyError: ") and "\n" not in found[3].error
    assert found[4].value == "fine" and all(outcome.seconds >= 0 for outcome in found.values())


def test_a_state_that_cannot_be_made(address):
    with open_pool(square, no_state, ray=address) as pool:
        assert {o.error for o in outcomes(pool, [1, 2]).values()} == {"no such model; name another"}


def test_one_state_per_process(address, tmp_path, monkeypatch):
    """Made once by the process that uses it; jobs see the directory of the caller."""
    monkeypatch.chdir(tmp_path)
    with open_pool(tell, count, ray=address) as pool:
        told = [outcome.value for outcome in outcomes(pool, range(3)).values()]
    assert len({made for made, *_ in told}) == 1
    for _, maker, user, directory, threads in told:
        assert maker == user and directory == str(tmp_path)
        assert (user == os.getpid()) == (address is None)
        assert address is None or threads == 1


def test_a_second_pool_has_a_state_of_its_own(connected):
    """In the same worker."""
    told = []
    for _ in range(2):
        with open_pool(tell, count, ray=connected) as pool:
            told += [outcome.value for outcome in outcomes(pool, range(2)).values()]
    assert len({made for made, *_ in told}) == 2 and len({process for _, process, *_ in told}) == 1


def test_shared_tensors(address):
    with open_pool(look, count, SHARED, ray=address) as pool:
        (found,) = outcomes(pool, [0]).values()
    assert found.error is None and found.value.keys() == SHARED.keys()
    for name, (tensor, in_store) in found.value.items():
        assert tensor.dtype == SHARED[name].dtype and torch.equal(tensor, SHARED[name]), name
        assert in_store == (address is not None) or tensor.numel() < 100, f"{name} was copied"


@pytest.mark.slow
def test_workers_that_die_and_results_that_cannot_travel(connected, monkeypatch):
    monkeypatch.setattr("mergekit_tspa.jobs.on_ray.RETRIES", 1)
    with open_pool(fail, nothing, ray=connected) as pool:
        found = outcomes(pool, ["death", "unpicklable", "fine"])
    assert "its worker died 2 times" in found[0].error and found[0].seconds is None
    assert "pickle" in found[1].error and found[2].value == "fine"


def test_a_machine_that_is_lost(cluster, tmp_path):
    """Its job runs again on another machine; nothing else is done twice. The pool joins the cluster and leaves it."""
    import ray

    ray.shutdown()
    with open_pool(linger, nothing, ray=cluster.address) as pool:
        second = cluster.add_node(num_cpus=1)
        until(lambda: pool.capacity == 2)
        for number in range(4):
            pool.submit(number, (tmp_path, number))
        started = lambda: {f.name.split("-")[0]: f.read_text() for f in tmp_path.iterdir()}  # noqa: E731
        until(lambda: second.node_id in started().values())
        (lost,) = (number for number, node in started().items() if node == second.node_id)
        cluster.remove_node(second, allow_graceful=False)
        (tmp_path / "go").touch()
        found = [pool.wait() for _ in range(4)]
        until(lambda: pool.capacity == 1)
    assert not ray.is_initialized()
    assert [outcome.error for outcome in found] == [None] * 4
    assert sorted(outcome.value[0] for outcome in found) == [0, 1, 2, 3]
    assert second.node_id not in {outcome.value[1] for outcome in found}
    runs = sorted(f.name.split("-")[0] for f in tmp_path.iterdir() if f.name != "go")
    assert runs == sorted(["0", "1", "2", "3", lost])


def test_more_than_a_machine_has(connected):
    for asked, words in (({"cpus": 64}, "64 cores for"), ({"gpus": 3}, "1 cores and 3 GPUs")):
        with pytest.raises(InputError, match=f"no machine of the Ray cluster has {words}"):
            open_pool(square, nothing, ray=connected, **asked)


def test_ray_that_is_not_installed(monkeypatch):
    find = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "ray":
            raise ImportError(name)
        return find(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    with pytest.raises(InputError, match=r"pip install 'mergekit-tspa\[ray\]'"):
        open_pool(square, nothing, ray="")


def test_addresses_that_nobody_answers():
    pytest.importorskip("ray").shutdown()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        closed = f"127.0.0.1:{taken.getsockname()[1]}"
        for address, words in (
            (closed, f"no Ray cluster answers at {closed}"),
            ("no-such-host.invalid:6379", "no Ray cluster answers"),
            ("recipes", "is no address of a Ray cluster"),
            ("ray://127.0.0.1:10001", "is no address of a Ray cluster"),
        ):
            with pytest.raises(InputError, match=words):
                open_pool(square, nothing, ray=address)
