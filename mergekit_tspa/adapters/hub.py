"""Find the directory of an adapter or a model: a local path, or a repository of the Hugging Face hub."""

import os
from pathlib import Path

from mergekit_tspa.adapters.adapter_files import CONFIG_FILE, read_config
from mergekit_tspa.errors import InputError, reason_of

_FILES = ["adapter_*", "adapters.safetensors"]


def locate_adapter(path: str, revision: str | None = None, cache_dir: str | None = None) -> str:
    """The local directory of an adapter; of a hub repository only the adapter's files are downloaded.

    Raises:
        InputError: it is neither a directory nor a repository that can be reached.
    """
    directory = os.path.expanduser(path)
    if os.path.isdir(directory):
        return directory
    if not _may_be_repository(path):
        raise InputError(f"{path}: there is no such adapter directory")
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(path, revision=revision, cache_dir=cache_dir, allow_patterns=_FILES)
    except Exception as error:  # network, authentication, missing repository: all mean the same to the user
        raise InputError(
            f"{path}: there is no such adapter directory, and it is not to be had from the hub "
            f"({reason_of(error)})"
        ) from error


def is_adapter(path: str, revision: str | None = None, cache_dir: str | None = None) -> bool:
    """Whether a directory or hub repository holds an adapter and no model."""
    directory = Path(os.path.expanduser(path))
    if os.path.isdir(directory):  # False also of a name that is too long for the file system
        return (directory / CONFIG_FILE).is_file() and not (directory / "config.json").exists()
    if not _may_be_repository(path):
        return False
    try:
        directory = _configurations(path, revision, cache_dir)
    except Exception:  # not there, or not reachable
        return False
    return (directory / CONFIG_FILE).is_file() and not (directory / "config.json").exists()


def check_reachable(path: str, revision: str | None = None) -> None:
    """Ask once for a model, of which transformers and mergekit ask the hub again and again for a minute.

    Raises:
        InputError: it is neither here nor a repository that can be reached or was downloaded before.
    """
    if os.path.exists(os.path.expanduser(path)):
        return
    if not _may_be_repository(path) and "/" in path:  # the hub's oldest models have no owner
        raise InputError(f"{path}: there is no such model directory")
    try:
        _configurations(path, revision)
    except Exception as error:  # network, authentication, missing repository: all mean the same to the user
        raise InputError(
            f"{path}: there is no such model directory, and it is not to be had from the hub "
            f"({reason_of(error)})"
        ) from error


def _configurations(path: str, revision: str | None, cache_dir: str | None = None) -> Path:
    """Where the configurations of a repository are once they are downloaded."""
    from huggingface_hub import snapshot_download

    files = [CONFIG_FILE, "config.json"]
    return Path(snapshot_download(path, revision=revision, cache_dir=cache_dir, allow_patterns=files))


def is_model(path: str) -> bool:
    """Whether a directory holds a full model."""
    directory = Path(os.path.expanduser(path))
    return os.path.isfile(directory / "config.json") and not os.path.exists(directory / CONFIG_FILE)


def base_of_adapter(path: str, revision: str | None = None, cache_dir: str | None = None) -> str | None:
    """The base model that an adapter's configuration names."""
    config = read_config(Path(locate_adapter(path, revision, cache_dir)), path)
    return config.get("base_model_name_or_path") or config.get("model")


def _may_be_repository(path: str) -> bool:
    return not path.startswith((".", "/", "~")) and path.count("/") == 1
