"""How recipes spell models: paths with spaces, `+`, `@` and `~` are read and written so that nothing is lost.

mergekit splits `base+adapter` at each `+` and `path@revision` at each `@`, whatever the directories are
called, and cannot write a reference whose text has a space.  What it reads and writes correctly stays as it
is.
"""

import os
from collections.abc import Iterable
from typing import Any


class UnclearReference(RuntimeError):
    """A reference that cannot be read."""


class UnreadableRecipe(RuntimeError):
    """A recipe that mergekit cannot read."""

    faults: list[str]  # a sentence for each place in it


def read_path(value: Any) -> Any:
    """What `ModelPath` is made of: `path@revision`, or a directory with `@` in its name; `~` is the home."""
    if isinstance(value, str):
        whole = {"path": os.path.expanduser(value)}
        path, *revisions = value.split("@")
        if not revisions or (os.path.isdir(whole["path"]) and not _is_directory(path)):
            return whole
        if len(revisions) > 1:
            raise UnclearReference(
                f"{value}: there is no such directory, and a model has one @ at most, before its revision; "
                "write `model: {model: {path: .., revision: ..}}`"
            )
        return {"path": os.path.expanduser(path), "revision": revisions[0]}
    if isinstance(value, dict) and str(value.get("path", "")).startswith("~"):
        return value | {"path": os.path.expanduser(value["path"])}
    return value


def read_reference(value: Any) -> Any:
    """What `ModelReference` is made of: `base+adapter`, split at the `+` that makes directories of both.

    Directories may have `+` in their names, and spaces may stand around the `+` between them.
    """
    if not isinstance(value, str) or "+" not in value:
        return value
    found = next((parts for parts in _splits(value) if all(map(_is_directory, parts))), None)
    if found is None:
        found = [part.strip() for part in value.split("+")]
    if len(found) > 2:
        raise UnclearReference(
            f"{value}: of several + it is not clear which stands between base and adapter, as no split gives "
            "two directories; write `model: {model: {path: ..}, lora: {path: ..}}`"
        )
    return dict(zip(("model", "lora"), found))


def written(model: Any, lora: Any, override_architecture: str | None, reads: Any) -> Any:
    """A reference in a recipe: its text where that is read back as the same, else its fields.

    Args:
        reads: says whether a text is read back as this reference
    """
    text = f"{model}+{lora}" if lora else str(model)
    if override_architecture is None and not {" ", '"'} & {*text} and reads(text):
        return text
    return {"model": model, "lora": lora, "override_architecture": override_architecture}


def _splits(text: str) -> Iterable[list[str]]:
    """`base+adapter` as mergekit reads it, the whole as one name, and a split at each other `+`."""
    chunks = text.split("+")
    joined = [["+".join(chunks[:i]), "+".join(chunks[i:])] for i in range(1, len(chunks))]
    for parts in ([joined[0]] if len(joined) == 1 else []) + [[text]] + joined:
        yield parts
        yield [part.strip() for part in parts]


def _is_directory(text: str) -> bool:
    path = os.path.expanduser(text)
    return os.path.isdir(path) or ("@" in path and os.path.isdir(path.rpartition("@")[0]))
