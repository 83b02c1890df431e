"""From the tensor names inside an adapter file to those of a base checkpoint."""

import re
from collections.abc import Collection, Iterable

from mergekit_tspa.errors import nearest

_WRAPPERS = re.compile(r"(^|(?<=\.))(_orig_mod|_fsdp_wrapped_module)\.")
_PEFT_PREFIX = "base_model.model."


def strip_prefixes(key: str) -> str:
    """Remove what PEFT (even if applied twice), torch.compile and FSDP put before and into a module's name.

    >>> strip_prefixes("base_model.model._orig_mod.model.layers.0.mlp.up_proj.lora_A.weight")
    'model.layers.0.mlp.up_proj.lora_A.weight'
    """
    key = _WRAPPERS.sub("", key)
    while key.startswith(_PEFT_PREFIX):
        key = key[len(_PEFT_PREFIX) :]
    return key


class TensorNames:
    """Looks a name up among the tensors of a checkpoint: itself, otherwise by the longest common suffix.

    The suffix covers a missing or an extra leading `model.` and the renamed wrappers of vision-language
    models.  Among several candidates the one that shares most parts of its path is taken; a tie is no match.
    """

    def __init__(self, tensors: Collection[str]):
        self.tensors = tensors
        self._by_suffix: dict[str, list[str]] = {}
        for name in tensors:
            for suffix in _suffixes(name):
                self._by_suffix.setdefault(suffix, []).append(name)

    def find(self, wanted: str) -> str | None:
        """The tensor's name in the checkpoint; None when there is none or more than one fits."""
        if wanted in self.tensors:
            return wanted
        for suffix in _suffixes(wanted):
            found = self._by_suffix.get(suffix, [])
            # `q_proj.weight` alone names a kind of layer, not one layer: a layer number must be in the match.
            if found and (suffix == wanted or re.search(r"\.\d+\.", suffix)):
                parts = set(wanted.split("."))
                shared = [len(parts & set(name.split("."))) for name in found]
                return found[shared.index(max(shared))] if shared.count(max(shared)) == 1 else None
        bare = wanted.removeprefix("model.")  # of a tensor outside the layers, such as the embeddings
        return bare if bare in self.tensors else None

    def nearest(self, wanted: str) -> str:
        return (nearest(wanted, self.tensors, cutoff=0) or ["none"])[0]


def _suffixes(name: str) -> Iterable[str]:
    """The name and everything after each of its dots, longest first."""
    parts = name.split(".")
    return (".".join(parts[start:]) for start in range(len(parts) - 1))
