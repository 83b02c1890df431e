"""What was tried of mergekit's features, malformed files and killed commands, and whether it held.

    PYTHONPATH=. python benchmarks/faults.py [--kills 60] [--out docs/reliability.md]

Kills every command that writes at random moments of a merge of a small random Llama in many shards, and runs the tests
of stock features, architectures, determinism and faults, malformed files in their slow number.  The table replaces the
one in `--out`.
"""

import argparse
import os
import platform
import re
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import pytest

from tests.adapters import test_fuzz
from tests.conftest import ROOT, save_adapter, save_llama
from tests.kills import kill, tasks

SUITES = {
    "stock features and options": "tests/test_surface.py",
    "architectures": "tests/plugin/test_architectures.py",
    "every method run twice, byte for byte": "tests/test_determinism.py",
    "full disks, permissions, two merges at once, extreme values": "tests/plugin/test_output.py",
}


class Passed:
    """A pytest plugin that counts."""

    count = 0

    def pytest_runtest_logreport(self, report):
        self.count += report.when == "call" and report.passed


def suite(file: str, *options: str) -> tuple[int, float]:
    """Tests of a file that passed, and seconds; ends the program if one does not."""
    passed, start = Passed(), time.perf_counter()
    if pytest.main([str(ROOT / file), "-W", "ignore", *options], plugins=[passed]):
        sys.exit(f"{file}: not all tests pass")
    return passed.count, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=60, help="of each command")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/reliability.md")
    args = parser.parse_args()
    machine = f"{platform.machine()} with {os.cpu_count()} CPU cores, Python {platform.python_version()}"
    lines = [f"{date.today()}, {machine}:\n", "| what | cases | held | seconds | |", "|---|---|---|---|---|"]
    for what, file in SUITES.items():
        count, seconds = suite(file)
        lines.append(f"| {what} | {count} | {count} | {seconds:.0f} | `{file}` |")
    _, seconds = suite("tests/adapters/test_fuzz.py", "-m", "slow")
    cases = test_fuzz.survives.cases
    lines.append(f"| malformed files | {cases} | {cases} | {seconds:.0f} | `tests/adapters/test_fuzz.py` |")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        base = save_llama(folder / "base")
        adapters = [
            save_adapter(base, folder / f"adapter{i}", seed=i, target_modules="all-linear") for i in (1, 2)
        ]
        for name, task in tasks(folder, base, adapters).items():
            whole, incomplete, seconds = kill(task, args.kills)
            left = f"left whole {whole}, visibly incomplete {incomplete}; done again, the same bytes"
            lines.append(
                f"| `{name}` killed | {args.kills} | {whole + incomplete} | {seconds:.0f} | {left} |"
            )
    table = "\n".join(lines)
    marked = re.compile(r"(<!-- benchmarks/faults.py -->\n).*?(<!-- end -->)", re.DOTALL)
    text = args.out.read_text(encoding="utf-8")
    args.out.write_text(marked.sub(lambda found: f"{found[1]}{table}\n{found[2]}", text), encoding="utf-8")
    print(table)


if __name__ == "__main__":
    main()
