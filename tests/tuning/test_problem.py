"""Which texts a search sees, how many, and what makes two searches the same."""

import math
import random
from itertools import pairwise

import pytest

from mergekit_tspa import InputError
from mergekit_tspa.calibration.examples import Example
from mergekit_tspa.scoring.losses import TextLoss
from mergekit_tspa.tuning.problem import (
    FEW,
    LEAST,
    MOST,
    TRIALS,
    UNSEEN,
    Problem,
    Split,
    affordable,
    only,
    split_texts,
    telling,
)
from tests.calibration.conftest import random_texts


def chosen(split: Split, numbers) -> dict:
    return {task: [split.texts[task][i] for i in own] for task, own in numbers.items()}


@pytest.mark.parametrize("counts", [(2, 2), (3, 40), (5, 100), (90, 90)])
@pytest.mark.parametrize("most", [LEAST, MOST])
def test_what_is_seen_and_what_is_not(counts, most):
    texts = {name: random_texts([name], n, seed=n)[name] for name, n in zip("ab", counts)}
    split = split_texts(texts, most)
    rounds = [chosen(split, numbers) for numbers in split.rounds]
    unseen = chosen(split, split.unseen)
    for smaller, larger in pairwise(rounds):
        for task in texts:
            assert larger[task][: len(smaller[task])] == smaller[task]
        assert sum(map(len, smaller.values())) < sum(map(len, larger.values()))
    for task, own in texts.items():
        seen = rounds[-1][task]
        assert not {*seen} & {*unseen[task]} and {*seen, *unseen[task]} <= {*own}
        assert 1 <= len(seen) <= most and 1 <= len(unseen[task]) <= UNSEEN * most
        assert len(rounds[0][task]) <= FEW
        assert len(unseen[task]) == min(UNSEEN * most, math.ceil(len(own) / 3))


def test_the_order_of_the_lines_does_not_matter():
    """Nor do texts that are there twice, which must not stand on both sides."""
    texts = random_texts("ab", 20)
    texts["a"] += [Example(e.tokens[:2], e.tokens[2:]) for e in texts["a"]]  # the same words, other answers
    split = split_texts(texts)
    mixed = {task: random.Random(3).sample([*own, *own[:9]], len(own) + 9) for task, own in texts.items()}
    assert split_texts(mixed) == split
    again = {task: [own[0]] * 5 for task, own in texts.items()}
    for few in (again, {task: own[:1] for task, own in texts.items()}):
        with pytest.raises(InputError, match="a: it has one text to judge by"):
            split_texts(few)


def test_more_time_is_more_texts():
    texts = {"a": [Example((1,), (2,) * 9)] * 3, "b": [Example((1,), (2,) * 29)] * 3}
    assert affordable(TRIALS * 40 * 10 * 1e-3, 1e-3, texts) == 10, "40 tokens for a text of each"
    assert affordable(1e-9, 1e-3, texts) == LEAST and affordable(1e9, 1e-3, texts) == MOST


def test_rounds_that_show_no_gain_are_left_out():
    """Two texts on which an adapter gains next to nothing would give shares that are noise."""
    numbers = [{"a": range(n), "b": range(n), "(general)": range(n)} for n in (1, 2, 4)]
    split = Split({}, numbers, {})
    base = {task: [TextLoss(10, 5)] * 4 for task in ("a", "b", "(general)")}
    single = {
        "a": [TextLoss(9.99, 5), TextLoss(5, 5), TextLoss(5, 5), TextLoss(5, 5)],
        "b": [TextLoss(5, 5)] * 4,
    }
    assert telling(split, base, single).rounds == numbers[1:]
    useless = single | {"b": [TextLoss(11, 5)] * 4}
    assert telling(split, base, useless).rounds == numbers[1:], "b counts nowhere"
    assert telling(split, base, {"a": single["b"], "b": single["b"]}).rounds == numbers
    with pytest.raises(InputError, match="no adapter answers its own texts better"):
        telling(split, base, {"a": useless["b"], "b": useless["b"]})
    with pytest.raises(InputError, match="b: it or the base answers its texts with NaN"):
        telling(split, base, single | {"b": [TextLoss(math.nan, 5)] * 4})
    assert only(base, {"a": [2, 0], "c": [1]}) == {"a": [base["a"][2], base["a"][0]]}


def test_another_search_has_another_fingerprint():
    texts, problem = random_texts("ab", 3), Problem()
    given = problem.fingerprint(["a", "b"], texts, {"a": ["x.jsonl", "all"]}, "base")
    assert given == Problem(seed=3).fingerprint(["a", "b"], texts, {"a": ["x.jsonl", "all"]}, "base")
    others = [
        Problem("worst").fingerprint(["a", "b"], texts, {"a": ["x.jsonl", "all"]}, "base"),
        Problem(general_limit=1.0).fingerprint(["a", "b"], texts, {"a": ["x.jsonl", "all"]}, "base"),
        Problem(rank=2).fingerprint(["a", "b"], texts, {"a": ["x.jsonl", "all"]}, "base"),
        problem.fingerprint(["b", "a"], texts, {"a": ["x.jsonl", "all"]}, "base"),
        problem.fingerprint(["a", "b"], texts | {"a": texts["a"][:2]}, {"a": ["x.jsonl", "all"]}, "base"),
        problem.fingerprint(["a", "b"], texts, {}, "base"),
        problem.fingerprint(["a", "b"], texts, {"a": ["x.jsonl", "all"]}, "another base"),
    ]
    assert len({given, *others}) == 1 + len(others)
