"""A killed command leaves a whole result or a visibly incomplete one, and can be run again."""

import pytest

from tests.kills import kill, tasks

COMMANDS = ("mergekit-yaml", "mergekit-multi", "mergekit-tspa adapter", "mergekit-tspa emr-task")


@pytest.fixture(scope="module")
def commands(llama, adapters, tmp_path_factory):
    return tasks(tmp_path_factory.mktemp("kills"), llama, adapters)


@pytest.mark.parametrize("times", [5, pytest.param(50, marks=pytest.mark.slow)])
@pytest.mark.parametrize("command", COMMANDS)
def test_killed(command, times, commands):
    outcome = kill(commands[command], times)
    assert outcome.whole + outcome.incomplete == times
