"""Independent work is shared out among threads, and given back in order."""

import threading
import time

import pytest
import torch

from mergekit_tspa.threads import in_threads


@pytest.fixture(autouse=True)
def four_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def test_results_come_in_the_order_of_the_items_and_the_threads_of_torch_are_shared():
    together = threading.Barrier(2, timeout=30)
    told = []

    def work(item):
        together.wait()  # two at a time, or it never ends
        return item, torch.get_num_threads(), torch.is_grad_enabled(), threading.current_thread().name

    results = in_threads(work, range(6), at_once=2, done=told.append)
    assert [item for item, *_ in results] == [*range(6)] and told == [1, 2, 3, 4, 5, 6]
    assert {threads for _, threads, *_ in results} == {2} and not any(grad for *_, grad, _ in results)
    assert len({name for *_, name in results}) == 2
    assert torch.get_num_threads() == 4


def test_one_at_a_time_needs_no_thread():
    here = threading.current_thread()
    assert in_threads(lambda item: threading.current_thread() is here, range(3), at_once=1) == [True] * 3
    assert in_threads(lambda item: threading.current_thread() is here, [1]) == [True]
    assert in_threads(lambda item: item, []) == []


def test_an_error_ends_the_work():
    done = []

    def work(item):
        if item == 2:
            raise ValueError("two")
        time.sleep(0.01)  # so that the error is heard long before the last item
        done.append(item)
        return item

    with pytest.raises(ValueError, match="two"):
        in_threads(work, range(1000), at_once=2)
    assert len(done) < 900 and torch.get_num_threads() == 4
