"""Our methods as mergekit sees them: parameters, input contract, and a dense fallback."""

from typing import Annotated, Any

import torch

from mergekit_tspa.errors import InputError
from mergekit_tspa.methods import Method
from mergekit_tspa.methods.inputs import PER_MODEL
from mergekit_tspa.plugin.compat import (
    BasePolicy,
    GroupMergeMethod,
    InputContract,
    MergeMethodSpec,
    ParameterScope,
    ParameterSpec,
    TensorGroup,
)

WEIGHT = ParameterSpec(
    name="weight",
    value_type=float,
    scope=ParameterScope.NON_BASE,
    default=1.0,
    description="weight of the adapter",
)
ADAPTER = ParameterSpec(
    name="adapter",
    value_type=bool,
    scope=ParameterScope.SHARED,
    default=False,
    description="also write the merge as one PEFT adapter",
)

# Of every method, as most do not look at texts and merge without them.
TEXTS = tuple(
    ParameterSpec(
        name=name, value_type=str, scope=ParameterScope.NON_BASE, default="", description=description
    )
    for name, description in (
        ("examples", "texts of what the adapter is for: a file of JSON lines, or `self`"),
        ("calibration", "statistics of such texts, in their place"),
        ("held_out", "texts that `mergekit-tspa score` and `tune` judge merges by, and no method sees"),
    )
)
LEAVES_OUT = ParameterSpec(
    name="adapter_leaves_out",
    value_type=str,
    scope=ParameterScope.SHARED,
    default="",
    description="what that adapter need not hold: magnitudes, norms, biases, embeddings, others",
)
ADAPTER_PARAMETERS = (ADAPTER.name, LEAVES_OUT.name)  # of the output, not of the method


class AdapterMergeMethod(GroupMergeMethod):
    """Adapts a row of the method table to mergekit's registry.

    Tensors that adapters touch are planned by `mergekit_tspa.plugin.planning`; `merge_group` only sees those
    that mergekit has to handle densely, such as embeddings whose vocabulary is being aligned.
    """

    def __init__(self, method: Method):
        self.method = method
        shared = [
            ParameterSpec(
                name=name,
                value_type=Annotated[(field.annotation, *field.metadata)]
                if field.metadata
                else field.annotation,
                scope=ParameterScope.NON_BASE if name in PER_MODEL else ParameterScope.SHARED,
                default=field.default,
                description=field.description,
            )
            for name, field in method.parameter_fields().items()
        ]
        self.spec = MergeMethodSpec(
            name=method.name,
            parameters=(WEIGHT, *TEXTS, ADAPTER, LEAVES_OUT, *shared),
            contract=InputContract(base=BasePolicy.REQUIRED),  # a slice or module may be the base's own
            pretty_name=method.title,
            reference_url=method.url,
        )

    def merge_group(self, group: TensorGroup, /, **parameters: Any) -> torch.Tensor:
        """The base, where nothing changes it.

        Raises:
            InputError: an input changes it; there are no factors here.
        """
        if group.base is None:  # the contract asks for one
            raise InputError(f"{self.method.name} needs a base_model")
        base = group.base.tensor
        changed = [entry for entry in group.non_base if not torch.equal(entry.tensor, base)]
        if not changed:
            return base
        raise InputError(dense_message(self.method, group.metadata.name or "a tensor", str(changed[0].id)))


def dense_message(method: Method, tensor: str, source: str) -> str:
    """Why `tensor` of `source` cannot be merged, and the ways out."""
    return (
        f"{method.name} merges LoRA factors, but {tensor} of {source} would reach it as a dense tensor; "
        "leave out the tokenizer option that resizes it, or use a method of mergekit such as task_arithmetic "
        "for this merge"
    )
