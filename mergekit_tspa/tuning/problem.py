"""What a search is for, and which texts it may see."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from mergekit_tspa.calibration.batches import Texts
from mergekit_tspa.calibration.examples import Example
from mergekit_tspa.errors import InputError
from mergekit_tspa.linalg import seed_of
from mergekit_tspa.scoring.losses import Losses

Goal = Literal["mean", "worst"]
FEW = 2  # texts of a task in the first round
LEAST, MOST = 6, 24  # texts of a task that the search reads
UNSEEN = 2  # times as many judge its result, if there are so many
TRIALS = 40  # for which there is to be time, each on all texts of the search
Numbers = Mapping[str, Sequence[int]]  # of texts, by task


class Split(NamedTuple):
    """The texts of a search, a part of what is given."""

    texts: Texts  # by task
    rounds: Sequence[Numbers]  # which of them a trial reads; each holds the one before it
    unseen: Numbers  # by the search


def split_texts(texts: Texts, most: int = MOST) -> Split:
    """A third of each task's texts stays unseen; which ones depends on the texts alone.

    Args:
        texts: that are given, by task
        most: texts of a task for the search

    Raises:
        InputError: a task has a single text.
    """
    chosen: dict[str, list[Example]] = {}
    search: dict[str, range] = {}
    unseen: dict[str, range] = {}
    for task, own in texts.items():
        if len(own) < 2:
            raise InputError(
                f"{task}: it has one text to judge by, and a search needs another one that it does not see; "
                "give more"
            )
        order = sorted(own, key=lambda text: seed_of("tune", *map(str, text.tokens)))
        aside = -(-len(own) // 3)
        seen, kept = order[aside:][:most], order[:aside][: UNSEEN * most]
        chosen[task] = seen + kept
        search[task], unseen[task] = range(len(seen)), range(len(seen), len(seen) + len(kept))
    largest = max(map(len, search.values()))
    sizes = sorted({min(FEW, largest), min(max(FEW, largest // 3), largest), largest})
    return Split(chosen, [{task: own[:size] for task, own in search.items()} for size in sizes], unseen)


def affordable(seconds: float, pace: float, texts: Texts) -> int:
    """How many texts of a task a trial can read, so that there is time for `TRIALS` of them.

    Args:
        seconds: for the search
        pace: seconds a token
        texts: by task
    """
    tokens = sum(sum(len(text.tokens) for text in own) / len(own) for own in texts.values())
    return max(LEAST, min(MOST, int(seconds / TRIALS / (pace * tokens))))


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
