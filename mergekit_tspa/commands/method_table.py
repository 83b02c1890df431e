"""The table that `mergekit-tspa methods` prints, kept as data: making it needs torch, which takes seconds.

After a change of the method table, `python -m mergekit_tspa.commands.method_table` writes `methods.json`
anew; a test compares the two.
"""

import json
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

FILE = "methods.json"


def kept() -> list[dict[str, Any]]:
    """The sections of the method table, each with `title`, `columns`, `rows` and a `note`."""
    return json.loads(files("mergekit_tspa.commands").joinpath(FILE).read_text(encoding="utf-8"))


def made() -> list[dict[str, Any]]:
    """The same, made from the methods themselves."""
    from mergekit_tspa.methods.table import sections

    return json.loads(json.dumps([section._asdict() for section in sections()]))


def draw() -> None:
    """Print the kept table as wide as the terminal is."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for section in kept():
        drawn = Table(title=section["title"], show_lines=True, title_justify="left")
        drawn.add_column(_plain(section["columns"][0]), no_wrap=True)
        drawn.add_column("what it does")
        drawn.add_column("own parameters")
        for name, what, *facts, parameters, paper in section["rows"]:
            facts = [
                f"{column}: {fact}" for column, fact in zip(section["columns"][2:], facts) if fact != "-"
            ]
            cells = name, "\n".join([what, *facts, paper]), parameters.replace(", `", "\n`")
            drawn.add_row(*map(_plain, cells))
        console.print(drawn)
        console.print(_plain(section["note"]), end="\n" if section["note"] else "")
    console.print("[bold]mergekit-tspa methods NAME[/] says what a method's parameters mean.")


def _plain(cell: str) -> str:
    """A cell without its Markdown."""
    return re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", cell).replace("`", "")


def renew() -> None:
    """Write `methods.json` beside this file."""
    text = json.dumps(made(), indent=1, ensure_ascii=False)
    Path(__file__).with_name(FILE).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    renew()
