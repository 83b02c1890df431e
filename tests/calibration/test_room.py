"""What the room may import, and that it says nothing by itself."""

from tests.test_rooms import PACKAGE, imports

ROOM = PACKAGE / "calibration"


def test_the_room_knows_the_lower_rooms_only():
    allowed = {"adapters", "base", "calibration", "errors", "linalg", "updates"}
    files = list(ROOM.glob("*.py"))
    assert len(files) > 5
    for file in files:
        for name in imports(file):
            top, *rest = name.split(".")
            assert top not in {"mergekit", "click"}, f"{file.name} imports {name}"
            if top == "mergekit_tspa":
                assert rest and rest[0] in allowed, f"{file.name} imports {name}"


def test_texts_have_no_way_into_logs():
    for file in ROOM.glob("*.py"):
        assert "logging" not in imports(file), file.name
        assert "print(" not in file.read_text(), file.name
