"""The trials of a search on disk: what was tried, what came of it, and how long it took.

Optuna keeps them in a journal to which lines are only added, so that a search that is cut off goes on where
it was.
"""

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, NamedTuple

import optuna
from optuna.distributions import BaseDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState

from mergekit_tspa.errors import InputError, reason_of
from mergekit_tspa.scoring.losses import Losses, TextLoss
from mergekit_tspa.tuning.problem import Problem
from mergekit_tspa.tuning.workbench import Spec

SCREEN, SEARCH, FINISH = "screen", "search", "finish"  # stages
PRUNED_TO = 3  # one trial of so many goes on to the next round
STARTUP = 8  # trials that are drawn at random


class Tried(NamedTuple):
    """A trial that is over."""

    number: int
    stage: str
    spec: Spec
    value: float | None  # of the goal, on the texts of its last round; None: it failed
    round: int  # how far it came
    excess: float  # of the loss on general texts over its limit
    losses: Losses  # on the texts of its last round
    rank: int | None
    error: str

    @property
    def feasible(self) -> bool:
        """Whether it keeps the limit."""
        return self.excess <= 0


def check_storage(file: Path) -> None:
    """
    Raises:
        InputError: the trials cannot be written to that file.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("ab") if file.exists() else TemporaryFile(dir=file.parent):
            pass
    except OSError as error:
        raise InputError(
            f"{file}: the trials cannot be kept there ({error.strerror}); name another file"
        ) from error


class Study:
    """
    Args:
        file: of the journal, which is made if it is not there
        problem: what is searched for
        fingerprint: of the problem and its texts

    Raises:
        InputError: the file is no journal of a search, or of another one.
    """

    def __init__(self, file: Path, problem: Problem, fingerprint: str):
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.file = file
        check_storage(file)
        # Beside a relative path Optuna would look for its lock in vain, and for ever.
        path = str(file.absolute())
        with warnings.catch_warnings():
            # `group` is experimental, and constraints_func is to have another name.
            warnings.simplefilter("ignore")
            sampler = optuna.samplers.TPESampler(
                seed=problem.seed,
                multivariate=True,
                group=True,
                constant_liar=True,
                n_startup_trials=STARTUP,
                constraints_func=_constraints,
            )
        try:
            _mend_end(file)
            self.study = optuna.create_study(
                storage=JournalStorage(JournalFileBackend(path)),
                study_name="tune",
                direction="maximize",
                sampler=sampler,
                pruner=optuna.pruners.SuccessiveHalvingPruner(1, PRUNED_TO),
                load_if_exists=True,
            )
            own = self.study.user_attrs.get("fingerprint")
        except Exception as error:  # json, keys that are missing, files that are no files
            raise InputError(
                f"{file}: holds no trials of a search ({reason_of(error)}); name another file"
            ) from error
        if own not in (None, fingerprint):
            raise InputError(
                f"{file}: holds the trials of another search, with other adapters, texts or limits; name "
                "another file, or delete it"
            )
        self.study.set_user_attr("fingerprint", fingerprint)
        # Trials of a run that was killed.
        for trial in self.study.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
            self.study.tell(trial.number, state=TrialState.FAIL)

    @property
    def seconds(self) -> float:
        """How long the search has run, in all its runs."""
        return float(self.study.user_attrs.get("seconds", 0.0))

    def spent(self, seconds: float) -> None:
        """Keep how long it has run."""
        self.study.set_user_attr("seconds", seconds)

    def ask(self) -> Trial:
        """The next trial of the search."""
        return self.study.ask()

    def start_at(self, point: Mapping[str, Any]) -> None:
        """Try this point before others."""
        self.study.enqueue_trial(dict(point), skip_if_exists=True)

    def note(self, trial: Trial, stage: str, spec: Spec, **found: Any) -> None:
        """Keep what is known of a trial."""
        for name, value in _attributes(stage, spec, **found).items():
            trial.set_user_attr(name, value)

    def tell(self, trial: Trial, value: float | None, pruned: bool = False) -> None:
        """A trial of the search is over; without a value it failed.

        Optuna forgets failures and would try their like again.  A pruned trial that reported nothing is the
        worst of all, which it avoids.
        """
        over = pruned or value is None
        self.study.tell(trial, None if over else value, TrialState.PRUNED if over else TrialState.COMPLETE)

    def add(self, stage: str, spec: Spec, value: float | None, **found: Any) -> None:
        """A trial that no sampler suggested."""
        state = TrialState.FAIL if value is None else TrialState.COMPLETE
        attributes = _attributes(stage, spec, **found)
        nothing: dict[str, BaseDistribution] = {}
        self.study.add_trial(
            optuna.trial.create_trial(
                state=state, value=value, params={}, distributions=nothing, user_attrs=attributes
            )
        )

    def tried(self, *stages: str) -> list[Tried]:
        """All trials that are over, in the order in which they began."""
        states = [TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL]
        trials = self.study.get_trials(deepcopy=False, states=states)
        found = [_tried(trial) for trial in trials if "stage" in trial.user_attrs]
        return [one for one in found if not stages or one.stage in stages]

    @property
    def size(self) -> int | None:
        """How many texts of a task trials read at most, once it is settled."""
        return self.study.user_attrs.get("size")

    def settle(self, size: int) -> None:
        """How many texts of a task trials read at most."""
        self.study.set_user_attr("size", size)


def _mend_end(file: Path) -> None:
    """Take away a line that was cut off when it was written; the next one would be added to it.

    Raises:
        ValueError: the file is no journal.
    """
    if not file.exists() or not file.stat().st_size:
        return
    with file.open("rb+") as journal:
        if "op_code" not in json.loads(journal.readline()):
            raise ValueError("its first line is not that of a journal")
        whole = journal.tell()
        for line in journal:
            whole += len(line) if line.endswith(b"\n") else 0
        journal.truncate(whole)


def _attributes(stage: str, spec: Spec, **found: Any) -> dict[str, Any]:
    losses = found.pop("losses", None) or {}
    known = {task: [list(text) for text in own] for task, own in losses.items()}
    own = {"method": spec.method, "parameters": dict(spec.parameters), "weights": dict(spec.weights)}
    return {"stage": stage, "spec": own, "losses": known, **found}


def _tried(trial: FrozenTrial) -> Tried:
    own = trial.user_attrs
    losses = {task: [TextLoss(*text) for text in texts] for task, texts in own["losses"].items()}
    return Tried(
        trial.number,
        own["stage"],
        Spec(**own["spec"]),
        own.get("value", trial.value),
        own.get("round", 0),
        own.get("excess", 0.0),
        losses,
        own.get("rank"),
        own.get("error", ""),
    )


def _constraints(trial: FrozenTrial) -> Sequence[float]:
    """By how much the loss on general texts is above its limit."""
    return (trial.user_attrs.get("excess", 0.0),)
