"""Which package may import what."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "mergekit_tspa"
CORE = {"errors", "linalg", "updates"}
ALLOWED = {  # room -> rooms of this package it may import
    "base": {"base", *CORE},
    "adapters": {"adapters", "base", *CORE},
    "alignment": {"alignment", "errors"},
    "spaces": {"spaces", *CORE},
    "rules": {"rules", "errors", "linalg"},
    "methods": {"methods", "adapters", "base", "alignment", "spaces", "rules", *CORE},
    "merging": {"merging", "methods", "adapters", "base", "alignment", "spaces", "rules", *CORE},
    "insight": {"insight", "merging", "methods", "adapters", "base", *CORE},
}


def imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found.add(node.module)
    return found


@pytest.mark.parametrize("room", ALLOWED)
def test_mathematical_rooms_do_not_know_mergekit(room):
    files = list((PACKAGE / room).glob("*.py"))
    assert files
    for file in files:
        for name in imports(file):
            top, *rest = name.split(".")
            assert top != "mergekit", f"{file.name} imports {name}"
            if top == "mergekit_tspa":
                assert rest and rest[0] in ALLOWED[room], f"{file.name} imports {name}"


def test_alignment_needs_only_torch_and_geoopt():
    for file in (PACKAGE / "alignment").glob("*.py"):
        outside = {name.split(".")[0] for name in imports(file)} - {"mergekit_tspa"}
        assert outside <= {"torch", "geoopt", "math", "typing", "collections"}, file


def test_measures_need_only_torch():
    found = imports(PACKAGE / "insight" / "measures.py")
    assert {name for name in found if name.startswith("mergekit_tspa")} <= {
        "mergekit_tspa.adapters",
        "mergekit_tspa.linalg",
    }
    assert {name.split(".")[0] for name in found} - {"mergekit_tspa"} <= {"torch", "math", "typing", "collections"}


def test_entry_needs_only_the_standard_library():
    """torch imports these two files at the end of every `import torch`."""
    for name in ("__init__.py", "_startup.py"):
        outside = {n.split(".")[0] for n in imports(PACKAGE / name)} - {"mergekit_tspa"}
        assert outside <= {"importlib", "sys", "types", "warnings"}


def test_only_the_plugin_and_the_command_line_know_mergekit():
    knowing = {
        file.relative_to(PACKAGE).parts[0]
        for file in PACKAGE.rglob("*.py")
        if any(name.split(".")[0] == "mergekit" for name in imports(file))
    }
    assert knowing == {"plugin", "commands"}


def test_the_peft_entry_knows_the_other_entry_and_no_files():
    """`merging/loaded.py` adds to a loaded model."""
    found = imports(PACKAGE / "merging" / "loaded.py")
    outside = {name.split(".")[0] for name in found} - {"mergekit_tspa"}
    assert outside <= {"peft", "torch", "collections", "logging", "typing"}
    rooms = {name.split(".")[1] for name in found if name.startswith("mergekit_tspa.")}
    assert rooms <= {"adapters", "base", "errors", "merging", "methods", "updates"}
