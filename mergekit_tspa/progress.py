"""Progress of long work, on the screen."""

from typing import Any

import tqdm


class Bar:
    """A bar for each kind of work; an object of this class is a context, and its `update` a `Progress`.

    What stands before a colon is the kind of work.  What follows it, a layer for instance, may change often.

    Args:
        quiet: show nothing
    """

    def __init__(self, quiet: bool):
        self.quiet = quiet
        self.kind: str | None = None
        self.bar: Any = None

    def __enter__(self) -> "Bar":
        return self

    def update(self, stage: str, done: float, left: float | None = None) -> None:
        """Show that a fraction of a stage is done, and which fraction of an objective is left."""
        kind = stage.partition(":")[0]
        if kind != self.kind:
            self.__exit__()
            self.kind = kind
            form = "{l_bar}{bar}| {elapsed}{postfix}"
            self.bar = tqdm.tqdm(desc=stage, total=100, leave=False, disable=self.quiet, bar_format=form)
        self.bar.set_description(stage, refresh=False)
        if left is not None:
            self.bar.set_postfix_str(f"{left:.3g} of the objective left", refresh=False)
        self.bar.update(100 * done - self.bar.n)

    def __exit__(self, *_error: object) -> None:
        if self.bar is not None:
            self.bar.close()
