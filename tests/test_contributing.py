"""CONTRIBUTING.md, followed to the letter in a copy of the package."""

import ast
import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.conftest import ROOT

TEXT = (ROOT / "CONTRIBUTING.md").read_text()
SECTION = re.compile(r"^## (Add [^:\n]*): [^\n]*\n(.*?)(?=^## |\Z)", re.DOTALL | re.MULTILINE)
BLOCK = re.compile(r"^```python (new|row|check) ?([^\n]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SECTIONS = {title: BLOCK.findall(body) for title, body in SECTION.findall(TEXT)}


def add_row(file, table: str, code: str) -> None:
    """Put the imports of `code` after the file's own, and the rest at the end of a tuple."""
    imports = [line for line in code.splitlines() if line.startswith("from ")]
    row = [f"    {line}" for line in code.splitlines() if line and not line.startswith("from ")]
    lines, tree = file.read_text().splitlines(), ast.parse(file.read_text())
    (end,) = (
        node.end_lineno
        for node in tree.body
        if isinstance(node, ast.Assign | ast.AnnAssign)
        and table in {getattr(target, "id", "") for target in getattr(node, "targets", None) or [node.target]}
    )
    first = next(
        node.lineno for node in tree.body if isinstance(node, ast.ImportFrom | ast.Import | ast.Assign)
    )
    lines[end - 1 : end - 1] = row
    lines[first - 1 : first - 1] = imports
    file.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("title", SECTIONS)
def test_what_it_says_works(title, tmp_path):
    shutil.copytree(ROOT / "mergekit_tspa", tmp_path / "mergekit_tspa")
    kinds = [kind for kind, *_ in SECTIONS[title]]
    assert kinds[-1] == "check"
    *steps, (_, _, check) = SECTIONS[title]
    run = [sys.executable, "-c", check]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    before = subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert before.returncode, "the check passes without the change"
    for kind, place, code in steps:
        name, _, table = place.partition(" ")
        if kind == "new":
            assert not (tmp_path / name).exists()
            (tmp_path / name).write_text(code)
        else:
            add_row(tmp_path / name, table, code)
    after = subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert after.returncode == 0, after.stderr


def test_it_has_the_five_things_people_add():
    assert [title.removeprefix("Add ") for title in SECTIONS] == [
        "a rule",
        "a space",
        "a family",
        "a kind of adapter",
        "an architecture",
    ]


def test_the_lines_are_counted():
    """Blank lines, docstrings and comments do not count as code."""
    table = dict(re.findall(r"^\| (an? [^|]*?) \| [^|]* \| ([^|]*?) \|$", TEXT, re.MULTILINE))
    for title, blocks in SECTIONS.items():
        counts = []
        for kind, _, code in blocks:
            if kind != "check":
                without = re.sub(r'^ *""".*?"""\n', "", code, flags=re.DOTALL | re.MULTILINE)
                counts.append(str(sum(bool(line.strip()) for line in without.splitlines())))
        assert table[title.removeprefix("Add ")] == " + ".join(counts), title
