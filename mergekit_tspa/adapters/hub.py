"""Find an adapter's directory: a local path, else a repository of the Hugging Face hub."""

import os

from mergekit_tspa.errors import InputError


def locate_adapter(path: str, revision: str | None = None, cache_dir: str | None = None) -> str:
    """Local directory of an adapter; downloads only its `adapter_*` files when it is a hub repository.

    Raises:
        InputError: neither a directory nor a repository that can be reached.
    """
    directory = os.path.expanduser(path)
    if os.path.isdir(directory):
        return directory
    looks_local = path.startswith((".", "/", "~")) or path.count("/") != 1
    if looks_local:
        raise InputError(f"{path}: there is no such adapter directory")
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(path, revision=revision, cache_dir=cache_dir, allow_patterns=["adapter_*"])
    except Exception as error:  # network, authentication, missing repository: all mean the same to the user
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"{path}: there is no such adapter directory, and it is not to be had from the hub ({reason})"
        ) from error
