"""Run the tutorial and write what it prints into the page: `python examples/tutorial.py [WORD]` (about ten minutes on two cores).

Every block of commands or Python in docs/tutorial.md is run in turn, from the root of the repository, with WORD only those
that contain it.  A block of text behind it is replaced by what was printed.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/tutorial.md"
# A block that is run, and perhaps what it printed.
STEP = re.compile(r"^```(bash|python)\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.DOTALL | re.MULTILINE)
SETUP = ("make ", "source ")  # what the reader does before
WIDTH = "100"


def environment() -> dict[str, str]:
    """The commands of this environment, and a fixed width."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PATH": path, "COLUMNS": WIDTH, "HF_HUB_OFFLINE": "1"}


def run(kind: str, code: str) -> str:
    """What a block prints."""
    command = ["bash", "-e", "-c", code] if kind == "bash" else [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{code}\n{done.stdout}\n{done.stderr}")
    return "\n".join(line.rstrip() for line in done.stdout.strip().splitlines())


def main(word: str = "") -> None:
    if not word:
        shutil.rmtree(ROOT / "build/tutorial", ignore_errors=True)
    (ROOT / "build/tutorial").mkdir(parents=True, exist_ok=True)
    for kind, code, text in STEP.findall(PAGE.read_text(encoding="utf-8")):
        if code.startswith(SETUP) or word not in code:
            continue
        start = time.time()
        printed = run(kind, code)
        print(f"{time.time() - start:6.1f} s  {code.splitlines()[0]}", flush=True)
        if text:
            block = f"```{kind}\n{code}```\n\n```text\n"
            page = PAGE.read_text(encoding="utf-8")
            PAGE.write_text(page.replace(f"{block}{text}```", f"{block}{printed}\n```"), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
