"""Malformed files and killed commands: cases tried, and whether each was survived.

    PYTHONPATH=. python benchmarks/faults.py [--kills 60] [--out benchmarks/results/faults.md]

Kills every command that writes at random moments of a merge of a small random Llama in many shards, and runs the
slow set of `tests/adapters/test_fuzz.py`.
"""

import argparse
import platform
import re
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

from tests.conftest import ROOT, save_adapter, save_llama
from tests.kills import kill, tasks

FUZZ = "tests/adapters/test_fuzz.py"


def fuzz() -> tuple[int, float]:
    """Cases that hypothesis counts, and seconds."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "pytest", FUZZ, "-m", "slow", "-W", "ignore", "--hypothesis-show-statistics"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if result.returncode:
        sys.exit(result.stdout)
    return sum(map(int, re.findall(r"(\d+) passing examples", result.stdout))), time.perf_counter() - start


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
