"""Malformed files and killed commands: cases tried, and whether each was survived.

    PYTHONPATH=. python benchmarks/faults.py [--kills 60] [--out benchmarks/results/faults.md]

Kills every command that writes at random moments of a merge of a small random Llama in many shards, and runs the
slow set of `tests/adapters/test_fuzz.py`.
"""

import argparse
import platform
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import pytest

from tests.adapters import test_fuzz
from tests.conftest import ROOT, save_adapter, save_llama
from tests.kills import kill, tasks


def fuzz() -> tuple[int, float]:
    """Files tried, and seconds."""
    start = time.perf_counter()
    if pytest.main([str(ROOT / "tests/adapters/test_fuzz.py"), "-m", "slow", "-W", "ignore"]):
        sys.exit("a malformed file was not survived")
    return test_fuzz.survives.cases, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60, help="of each command")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/faults.md")
    args = parser.parse_args()
    lines = [
        "| fault | cases | survived | left whole | left visibly incomplete | seconds |",
        "|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        base = save_llama(folder / "base")
        adapters = [save_adapter(base, folder / f"adapter{i}", seed=i, target_modules="all-linear") for i in (1, 2)]
        for name, task in tasks(folder, base, adapters).items():
            whole, incomplete, seconds = kill(task, args.kills)
            counts = f"{args.kills} | {whole + incomplete} | {whole} | {incomplete}"
            lines.append(f"| `{name}` killed | {counts} | {seconds:.0f} |")
            print(lines[-1], flush=True)
    cases, seconds = fuzz()
    lines.append(f"| malformed files | {cases} | {cases} | - | - | {seconds:.0f} |")
    head = f"{date.today()}, Python {platform.python_version()}, {platform.machine()}, by `benchmarks/faults.py`.\n"
    args.out.write_text("\n".join([head, *lines, ""]), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
