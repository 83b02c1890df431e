"""What a search is for, and which texts it may see."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from mergekit_tspa.calibration.batches import Texts
from mergekit_tspa.errors import InputError
from mergekit_tspa.linalg import seed_of
from mergekit_tspa.scoring.losses import Losses

Goal = Literal["mean", "worst"]
MOST = 24  # texts of a task that a trial reads
UNSEEN = 64  # and texts that the result is judged by at last, at most
FEW = 2  # in the first round
Numbers = Mapping[str, Sequence[int]]  # of texts, by task


class Split(NamedTuple):
    """Texts of every task by their numbers."""

    rounds: Sequence[Numbers]  # each holds the one before it
    unseen: Numbers  # by the search

    @property
    def search(self) -> Numbers:
        """All that a trial may read."""
        return self.rounds[-1]


def split_texts(texts: Texts, most: int = MOST) -> Split:
    """A third of each task's texts stays unseen; which ones depends on the texts alone.

    Args:
        texts: of every task
        most: texts of a task for the search

    Raises:
        InputError: a task has a single text.
    """
    search, unseen = {}, {}
    for task, own in texts.items():
        if len(own) < 2:
            raise InputError(
                f"{task}: it has one text to judge by, and a search needs another one that it does not see; "
                "give more"
            )
        order = sorted(range(len(own)), key=lambda i: seed_of("tune", *map(str, own[i].tokens)))
        aside = -(-len(own) // 3)
        unseen[task], search[task] = order[:aside][:UNSEEN], order[aside:][:most]
    largest = max(map(len, search.values()))
    sizes = sorted({min(FEW, largest), max(FEW, largest // 3), largest})
    return Split([{task: own[:size] for task, own in search.items()} for size in sizes], unseen)


def only(losses: Losses, numbers: Numbers) -> Losses:
    """The losses of some texts, in the order of their numbers."""
    return {task: [losses[task][i] for i in own] for task, own in numbers.items() if task in losses}


class Problem(NamedTuple):
    """What is searched for."""

    goal: Goal = "mean"
    general_limit: float | None = None  # loss on general texts, at most
    rank: int | None = None  # of the one adapter that the result is to be
    seed: int = 0

    def fingerprint(self, adapters: Sequence[str], texts: Texts) -> str:
        """Of everything by which trials are comparable, so that none of another search is taken for its "
        "own."""
        tokens = {task: [list(example.tokens) for example in own] for task, own in texts.items()}
        what = json.dumps([self.goal, self.general_limit, self.rank, list(adapters), tokens])
        return hashlib.sha256(what.encode()).hexdigest()
