"""The directory that a merge writes: of one process at a time, and always whole or visibly incomplete."""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError
from transformers import PretrainedConfig

from mergekit_tspa.errors import InputError
from mergekit_tspa.plugin.compat import MergeConfiguration

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


_WEIGHTS = re.compile(r"(pytorch_)?model(-\d+(-of-\d+)?)?\.(safetensors|bin)(\.index\.json)?")


@contextmanager
def held(directory: Path) -> Iterator[None]:
    """Make and hold an output directory while it is written; left empty, a new one is removed again.

    The lock is the kernel's, on the directory itself: it leaves no file and ends with the process, however
    that ends.

    Raises:
        InputError: another merge holds it, or a file cannot be read or written.
    """
    try:
        new = not directory.exists()
        if not new and not directory.is_dir():
            raise InputError(f"{directory}: it is a file; name a directory")
        directory.mkdir(parents=True, exist_ok=True)
        lock = _lock(directory)
        try:
            yield
        finally:
            if lock is not None:
                os.close(lock)
            if new:
                with suppress(OSError):
                    directory.rmdir()
    except (OSError, SafetensorError) as error:
        raise InputError(f"{directory}: the merge stopped and is not complete: {error}") from error


def _lock(directory: Path) -> int | None:
    if fcntl is None:
        return None
    lock = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(lock)
        raise InputError(
            f"{directory}: another merge is writing there; wait, or name another directory"
        ) from error
    except OSError:  # some network file systems have no locks
        pass
    return lock


@contextmanager
def replaced(directory: Path) -> Iterator[Path]:
    """A directory beside `directory` that takes its name once it is whole.

    What a killed run left there is cleared.
    """
    partial = directory.with_name(f".{directory.name}.partial")
    with held(partial):
        try:
            _clear(partial)
            yield partial
            partial.rename(directory)
        except BaseException:
            _clear(partial)
            raise


def save_whole(config: PretrainedConfig) -> None:
    """Let `save_pretrained` name its files once they are written.

    A `config.json` that was cut off looks like a finished merge.
    """
    kind = type(config)

    def save_pretrained(self, directory, **kwargs):
        with tempfile.TemporaryDirectory(prefix=".config-", dir=directory) as partial:
            kind.save_pretrained(self, partial, **kwargs)
            for file in Path(partial).iterdir():
                file.replace(Path(directory, file.name))

    # Not an attribute of the object, which would be written with it.
    config.__class__ = type(kind.__name__, (kind,), {"save_pretrained": save_pretrained})


def weights_in(directory: Path) -> dict[str, tuple[int, int]]:
    """The files of a model's weights that are there, as transformers names them, and when they were
    written.
    """
    files = directory.iterdir() if directory.is_dir() else ()
    found = ((file.name, file.stat()) for file in files if _WEIGHTS.fullmatch(file.name) and file.is_file())
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in found}


def clear_earlier(directory: Path, earlier: dict[str, tuple[int, int]]) -> None:
    """Take away weights that were there before a merge and are not part of it: loaders read
    `model.safetensors` even where an index of shards lies beside it.
    """
    for name, _ in earlier.items() & weights_in(directory).items():
        (directory / name).unlink()


def _clear(directory: Path) -> None:
    for old in directory.iterdir():
        shutil.rmtree(old) if old.is_dir() else old.unlink()


def refuse_inputs(config: MergeConfiguration, directory: Path) -> None:
    """
    Raises:
        InputError: the directory holds a model or adapter of the recipe.
    """
    for reference in config.referenced_models():
        for path in filter(None, (reference.model, reference.lora)):
            if os.path.realpath(path.path) == os.path.realpath(directory):
                raise InputError(f"{directory}: is an input of this merge; name another directory")


def begin_model(config: MergeConfiguration, directory: Path) -> None:
    """Take away the `config.json` of an earlier merge; mergekit writes it anew after the weights.

    Raises:
        InputError: the directory holds a model or adapter of the recipe.
    """
    refuse_inputs(config, directory)
    if directory.is_dir():
        (directory / "config.json").unlink(missing_ok=True)
