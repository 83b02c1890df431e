"""Searches of seconds: few methods, and prompts that the adapters answer themselves."""

import pytest

from mergekit_tspa.methods import METHODS
from tests.conftest import write_lines

SOME = "core_tsv lora_ties actmat lora_task_arithmetic ctm_iso"


@pytest.fixture
def few_methods(monkeypatch):
    kept = {name: METHODS[name] for name in SOME.split()}
    monkeypatch.setattr("mergekit_tspa.tuning.tuner.METHODS", kept)


@pytest.fixture(scope="session")
def prompts(tmp_path_factory):
    """A file for each adapter; what it writes itself it answers better than the base."""
    folder = tmp_path_factory.mktemp("prompts")
    return [
        write_lines(folder / f"{name}.jsonl", [{"prompt": f"w{i} w{i + by}"} for i in range(1, 13)])
        for name, by in (("math", 3), ("code", 4))
    ]
