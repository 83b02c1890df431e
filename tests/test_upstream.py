"""The proposal of docs/upstream.md: its change applies to the mergekit that is installed, and its tests pass."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import mergekit

from tests.conftest import ROOT


def test_the_change_and_its_tests(tmp_path):
    text = (ROOT / "docs/upstream.md").read_text()
    (change,) = re.findall(r"^```diff\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    (tests,) = re.findall(r"^```py\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    shutil.copytree(Path(mergekit.__file__).parent, tmp_path / "mergekit")
    (tmp_path / "change.diff").write_text(change)
    subprocess.run(["git", "apply", "-p1", "change.diff"], cwd=tmp_path, check=True)
    (tmp_path / "test_merge_method_plugins.py").write_text(tests)
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "--rootdir",
        tmp_path,
    ]
    done = subprocess.run([*command, tmp_path], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert "4 passed" in done.stdout, done.stdout + done.stderr
