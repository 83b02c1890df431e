"""What a search is for, and which texts it may see."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from mergekit_tspa.calibration.batches import Texts
from mergekit_tspa.calibration.examples import Example
from mergekit_tspa.errors import InputError
from mergekit_tspa.linalg import seed_of
from mergekit_tspa.scoring.losses import LEAST_GAIN, Losses, gains

Goal = Literal["mean", "worst"]
FEW = 2  # texts of a task in the first round
LEAST, MOST = 6, 24  # texts of a task that the search reads
UNSEEN = 2  # times as many judge its result, if there are so many
SHOWN = 0.25  # of an adapter's gain on all of its texts, at least, that those of a round must show
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
        InputError: a task has a single text, or one text again and again.
    """
    chosen: dict[str, list[Example]] = {}
    search: dict[str, range] = {}
    unseen: dict[str, range] = {}
    for task, own in texts.items():
        # A text that is there twice must not be on both sides.
        different = {(text.tokens, text.start): text for text in own}
        if len(different) < 2:
            raise InputError(
                f"{task}: it has one text to judge by, and a search needs another one that it does not see; "
                "give more"
            )
        order = sorted(
            different.values(), key=lambda text: (seed_of("tune", *map(str, text.tokens)), text.start)
        )
        aside = -(-len(order) // 3)
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


def telling(split: Split, base: Losses, single: Losses) -> Split:
    """Without rounds whose few texts do not show what the adapters gain: a share of nearly nothing is noise.

    Args:
        split: of texts
        base: losses on all of them, of the base
        single: of each adapter on its own

    Raises:
        InputError: an adapter answers with NaN, or none is better than the base on its own texts.
    """

    def gained(numbers: Numbers) -> dict[str, float]:
        own = {task: numbers[task] for task in single}
        return gains(only(base, own), only(single, own))

    *few, every = split.rounds
    whole = gained(every)
    if broken := [task for task, gain in whole.items() if not math.isfinite(gain)]:
        raise InputError(
            f"{broken[0]}: it or the base answers its texts with NaN or infinite losses; leave it out, or "
            "save it again"
        )
    useful = {task: gain for task, gain in whole.items() if gain > LEAST_GAIN}
    if not useful:
        raise InputError(
            "no adapter answers its own texts better than the base, so there is no gain that a merge could "
            "retain; give texts of what each was trained for"
        )
    rounds = [
        one
        for one in few
        if all(gained(one)[task] > max(LEAST_GAIN, SHOWN * gain) for task, gain in useful.items())
    ]
    return split._replace(rounds=[*rounds, every])


def only(losses: Losses, numbers: Numbers) -> Losses:
    """The losses of some texts, in the order of their numbers."""
    return {task: [losses[task][i] for i in own] for task, own in numbers.items() if task in losses}


class Problem(NamedTuple):
    """What is searched for."""

    goal: Goal = "mean"
    general_limit: float | None = None  # loss on general texts, at most
    rank: int | None = None  # of the one adapter that the result is to be
    seed: int = 0

    def fingerprint(self, adapters: Sequence[str], texts: Texts, *more: object) -> str:
        """Of everything by which trials are comparable, so that none of another search is taken for its own.

        Args:
            adapters: their names
            texts: that judge
            more: of what JSON can hold, or what says who it is in a string
        """
        tokens = {task: [list(example.tokens) for example in own] for task, own in texts.items()}
        own = [self.goal, self.general_limit, self.rank, list(adapters), tokens, *more]
        what = json.dumps(own, default=str)
        return hashlib.sha256(what.encode()).hexdigest()
