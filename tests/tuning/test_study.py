"""Trials on disk: kept, resumed, and refused where they are of something else."""

import json
import math
import os
from pathlib import Path

import pytest

from mergekit_tspa import InputError
from mergekit_tspa.scoring.losses import TextLoss
from mergekit_tspa.tuning.problem import Problem
from mergekit_tspa.tuning.study import FINISH, SCREEN, SEARCH, Study, check_storage
from mergekit_tspa.tuning.workbench import Spec

LOSSES = {"math": [TextLoss(3.5, 2), TextLoss(1.0, 4)]}


def opened(file, fingerprint="own") -> Study:
    return Study(file, Problem(), fingerprint)


def test_what_is_kept_is_there_again(tmp_path):
    file = tmp_path / "not there" / "trials"
    study = opened(file)
    assert study.seconds == 0 and study.size is None and study.tried() == []
    first = Spec("core_tsv", {"lambda": 0.7, "svc": True}, {"math": 0.5})
    study.add(SCREEN, first, 0.4, losses=LOSSES, rank=3, excess=-0.1, round=0)
    study.add(SCREEN, Spec("lora_ties"), None, error="it is too large", round=0)
    study.add(FINISH, Spec("distill"), 0.9, losses=LOSSES, rank=None, excess=0.2, round=2)
    trial = study.ask()
    trial.suggest_float("x", 0, 1)
    study.note(trial, SEARCH, first, losses=LOSSES, rank=2, value=0.6, excess=0.0, round=1)
    study.tell(trial, 0.6)
    study.spent(12.5)
    study.settle(9)
    for again in (study, opened(file)):
        assert again.seconds == 12.5 and again.size == 9
        screened = again.tried(SCREEN)
        assert [one.spec for one in screened] == [first, Spec("lora_ties")]
        assert screened[0].losses == LOSSES and screened[0].rank == 3 and screened[0].feasible
        assert screened[1].value is None and screened[1].error == "it is too large"
        (finish,), (searched,) = again.tried(FINISH), again.tried(SEARCH)
        assert not finish.feasible and finish.round == 2
        assert (searched.value, searched.round, searched.feasible) == (0.6, 1, True)
        assert [one.number for one in again.tried()] == [0, 1, 2, 3]


def test_trials_of_a_run_that_was_killed_are_over(tmp_path):
    study = opened(tmp_path / "trials")
    trial = study.ask()
    study.note(trial, SEARCH, Spec("core_tsv"), error="", round=0)
    assert study.tried() == []
    again = opened(tmp_path / "trials")
    assert [one.value for one in again.tried(SEARCH)] == [None]
    again.start_at({"x": 0.25})
    third = opened(tmp_path / "trials")
    third.start_at({"x": 0.25})
    assert third.ask().suggest_float("x", 0, 1) == 0.25
    assert third.ask().suggest_float("x", 0, 1) != 0.25, "a point is tried once"


def test_other_files_are_refused_and_left_as_they_are(tmp_path):
    opened(tmp_path / "trials")
    before = (tmp_path / "trials").read_bytes()
    with pytest.raises(InputError, match="trials of another search"):
        opened(tmp_path / "trials", "another")
    assert (tmp_path / "trials").read_bytes().startswith(before)
    opened(tmp_path / "trials")
    for number, text in enumerate(["no journal", "a: b\nc: d\n", json.dumps({"a": 1}) + "\n", "\0" * 50]):
        file = tmp_path / f"broken{number}"
        file.write_text(text)
        with pytest.raises(InputError, match=r"holds no trials of a search.*name another file"):
            opened(file)
        assert file.read_text() == text
    (tmp_path / "file").write_text("")
    for unwritable in (tmp_path, tmp_path / "file/below/trials", tmp_path / ("n" * 300)):
        with pytest.raises(InputError, match=r"the trials cannot be kept there .*; name another file"):
            check_storage(unwritable)
        with pytest.raises(InputError, match="the trials cannot be kept there"):
            opened(unwritable)


def test_a_lock_that_a_kill_left_does_not_hold_for_ever(tmp_path, monkeypatch):
    """Also beside a relative path in a directory, where a link to the file would lead nowhere."""
    monkeypatch.chdir(tmp_path)
    study, symlink, targets = opened(Path("sub/trials")), os.symlink, []

    def watched(target, link):
        targets.append(target)
        symlink(target, link)

    monkeypatch.setattr("os.symlink", watched)
    study.spent(1.0)
    assert targets and all((tmp_path / "sub" / target).exists() for target in targets)


def test_values_that_are_no_numbers_do_not_end_it(tmp_path):
    study = opened(tmp_path / "trials")
    study.add(SCREEN, Spec("core_tsv"), None, losses={"a": [TextLoss(math.nan, 2)]}, excess=math.inf, round=0)
    again = opened(tmp_path / "trials").tried(SCREEN)[0]
    assert math.isnan(again.losses["a"][0].loss) and again.value is None


def test_a_line_that_was_cut_off_is_taken_away(tmp_path):
    """As when the disk was full, or the machine went off."""
    file = tmp_path / "trials"
    study = opened(file)
    study.add(SCREEN, Spec("core_tsv"), 0.5, losses=LOSSES, round=0)
    whole = file.read_bytes()
    file.write_bytes(whole + b'{"op_code":3,"worker_id":"e7')
    for number in range(2, 4):
        again = opened(file)
        again.add(SCREEN, Spec("lora_ties"), 0.4, losses=LOSSES, round=0)
        assert [one.value for one in again.tried()] == [0.5, *[0.4] * (number - 1)]
    assert file.read_bytes().startswith(whole)
