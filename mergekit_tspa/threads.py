"""Independent work on tensors, in as many threads as torch uses."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_threads(
    work: Callable[[Item], Result],
    items: Sequence[Item],
    at_once: int | None = None,
    done: Callable[[int], None] = lambda count: None,
) -> list[Result]:
    """`work` of each item, in their order.  The threads of torch are shared out among the items worked on.

    The decompositions of small matrices gain little from several threads, and items gain all of it.

    Args:
        at_once: how many items may be worked on at the same time, for the sake of memory; by default as many
            as torch has threads
        done: called with the number of items that are done
    """
    threads = torch.get_num_threads()
    workers = max(1, min(threads, len(items), at_once or threads))
    results: list[Result] = []
    if workers == 1:
        for item in items:
            results.append(work(item))
            done(len(results))
        return results

    def without_gradients(item: Item) -> Result:
        with torch.no_grad():  # which each thread has to say for itself
            return work(item)

    # The number of torch's threads is one of each thread: that which asks keeps its own.
    with ThreadPoolExecutor(
        workers, initializer=torch.set_num_threads, initargs=(threads // workers,)
    ) as pool:
        try:
            for result in pool.map(without_gradients, items):
                results.append(result)
                done(len(results))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return results
