"""From the module names inside an adapter file to the tensor names of a base checkpoint."""

import difflib
import re
from collections.abc import Collection, Iterable

from mergekit_tspa.errors import InputError

_WRAPPERS = re.compile(r"(^|(?<=\.))(_orig_mod|_fsdp_wrapped_module)\.")
_PEFT_PREFIX = "base_model.model."


def strip_prefixes(key: str) -> str:
    """Remove what PEFT (possibly applied twice), torch.compile and FSDP put before and into a module's name.

    >>> strip_prefixes("base_model.model._orig_mod.model.layers.0.mlp.up_proj.lora_A.weight")
    'model.layers.0.mlp.up_proj.lora_A.weight'
    """
    key = _WRAPPERS.sub("", key)
    while key.startswith(_PEFT_PREFIX):
        key = key[len(_PEFT_PREFIX) :]
    return key


class TensorNames:
    """Looks a module's `.weight` up among the tensors of a checkpoint: exact, else by the longest common suffix.

    The suffix rule covers a missing or an extra leading `model.` and the renamed wrappers of vision-language
    models.  Among several candidates the one that shares most parts of its path wins; a tie is no match.
    """

    def __init__(self, tensors: Collection[str]):
        self.tensors = tensors
        self._by_suffix: dict[str, list[str]] = {}
        for name in tensors:
            for suffix in _suffixes(name):
                self._by_suffix.setdefault(suffix, []).append(name)

    def find(self, module: str) -> str | None:
        """The name of the module's weight in the checkpoint; None when there is none or more than one fits."""
        weight = f"{module}.weight"
        if weight in self.tensors:
            return weight
        for suffix in _suffixes(weight):
            found = self._by_suffix.get(suffix, [])
            # A lone `q_proj.weight` names a kind of layer, not one of them: a layer number must be part of the match.
            if found and (suffix == weight or re.search(r"\.\d+\.", suffix)):
                parts = set(weight.split("."))
                shared = [len(parts & set(name.split("."))) for name in found]
                return found[shared.index(max(shared))] if shared.count(max(shared)) == 1 else None
        return None

    def nearest(self, module: str) -> str:
        return (difflib.get_close_matches(f"{module}.weight", self.tensors, n=1, cutoff=0) or ["none"])[0]


def _suffixes(name: str) -> Iterable[str]:
    """The name and everything after each of its dots, longest first."""
    parts = name.split(".")
    return (".".join(parts[start:]) for start in range(len(parts) - 1))


def match_modules(modules: Collection[str], tensors: Collection[str], adapter: str, base: str) -> dict[str, str]:
    """Map every module of an adapter to the base tensor it updates, `{module: tensor}`.

    Raises:
        InputError: a module matches no tensor, or two modules match the same one.
    """
    names = TensorNames(tensors)
    found = {module: names.find(module) for module in modules}
    missing = [module for module, tensor in found.items() if tensor is None]
    if missing:
        listed = ", ".join(missing[:8]) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
        raise InputError(
            f"{adapter}: {len(missing)} of {len(found)} adapted modules match no tensor of {base}: {listed} "
            f"(nearest name there: {names.nearest(missing[0])}); was the adapter trained on another base model, "
            "or does it adapt an embedding or head that the base ties to another tensor?"
        )
    owner: dict[str, str] = {}
    for module, tensor in found.items():
        if tensor in owner:
            raise InputError(
                f"{adapter}: modules {owner[tensor]} and {module} both match {tensor} of {base}; "
                "re-save the adapter with one name per module"
            )
        owner[tensor] = module
    return found
