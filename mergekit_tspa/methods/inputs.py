"""What a method is given: its parameters, the factors of tensors, and the attention pairs they belong to."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple, Protocol, TypeAlias

import torch
from pydantic import AfterValidator, BaseModel, Field

from mergekit_tspa.adapters import Adapter, Extraction
from mergekit_tspa.alignment.attention import SideGrams
from mergekit_tspa.base.geometry import AttentionGeometry
from mergekit_tspa.linalg import seed_of
from mergekit_tspa.symmetry.blocks import kinds_of
from mergekit_tspa.updates import LoraFactors

# What a method knows of the whole model before it merges the first tensor: statistics of each adapter, or
# what texts say of each tensor.
Survey: TypeAlias = Mapping[Any, Any]


class Progress(Protocol):
    """Hears of long work."""

    def __call__(self, stage: str, done: float, left: float | None = None) -> None:
        """
        Args:
            stage: what is being done
            done: which fraction of it is done
            left: of an objective, which fraction of its start is left
        """


def silent(stage: str, done: float, left: float | None = None) -> None:
    """The progress that nobody hears of."""


def _symmetries(text: str | None) -> str | None:
    """
    Raises:
        InputError: one of the names is no symmetry.
    """
    kinds_of(text or "")
    return text


class Parameters(BaseModel, frozen=True, extra="forbid", populate_by_name=True):
    """Parameters that every method has; a method's own are fields of its subclass, in the order of the
    paper.
    """

    lambda_: float = Field(
        1.0, alias="lambda", allow_inf_nan=False, description="factor on the merged update"
    )
    rank: int | None = Field(
        None, ge=1, description="reduce merged updates of a higher rank to this one, by SVD"
    )
    extract_rank: int | None = Field(
        None, ge=1, description="rank of the factors of full models; 32 if not given"
    )
    extract_energy: float | None = Field(
        None, gt=0, le=1, description="instead, the share of ||W - W_base||^2 that they keep, up to rank 256"
    )

    align: Annotated[str | None, AfterValidator(_symmetries)] = Field(
        None, description="before that, align full models to the base by permutation, rotation, scale, or all"
    )

    @property
    def extraction(self) -> Extraction:
        return Extraction(self.extract_rank, self.extract_energy, kinds_of(self.align or ""))


PER_MODEL = ("extract_rank", "extract_energy", "align")  # parameters that may differ from model to model


class OneByOneParameters(Parameters):
    """What may come before and after a closed formula that looks at one tensor at a time."""

    pico: bool = Field(
        False, description="before merging, damp the output directions that adapters share (Pico)"
    )
    svc: bool = Field(
        False, description="after merging, calibrate singular values that several adapters count (SVC)"
    )

    def own(self) -> dict[str, Any]:
        """The method's own parameters, as its function takes them."""
        shared = OneByOneParameters.model_fields
        return {name: getattr(self, name) for name in type(self).model_fields if name not in shared}


class TensorInputs(NamedTuple):
    """Everything a method may know about one tensor: the factors of the adapters that touch it, in recipe
    order.
    """

    name: str
    factors: Sequence[LoraFactors]
    weights: Sequence[float]  # a_t, never 0
    parameters: Any  # of the method's class
    adapters: Sequence[Adapter] = ()  # whose factors they are
    survey: Survey | None = None  # what is known of the whole model, where it is wanted
    transposed: bool = False  # whether the base stores the tensor `(d_in, d_out)`

    def generator(self, seed: int, *names: str) -> torch.Generator:
        """A source of randomness that depends on the seed and on names only, not on the order of
        execution.
        """
        return torch.Generator(self.factors[0].B.device).manual_seed(seed_of(str(seed), self.name, *names))


class Planned(NamedTuple):
    """What a method may know about one tensor before a factor is loaded."""

    name: str
    shape: tuple[int, int]
    ranks: Sequence[int]  # of the adapters that touch it
    parameters: Any  # of the method's class


class PairSide(NamedTuple):
    """One side of a pair: a tensor and, per adapter of the pair, the module that updates it."""

    role: str  # q, k, v or o
    tensor: str
    bias: str | None
    modules: tuple[str | None, ...]  # per adapter
    weights: tuple[float, ...]  # a_t of each adapter in this tensor, that of the pair where it has no module


class PairPlan(NamedTuple):
    """One product of one attention block, before anything is loaded."""

    name: str  # block and roles
    x: PairSide  # query or output
    y: PairSide  # key or value
    adapters: tuple[Adapter, ...]
    weights: tuple[float, ...]
    geometry: AttentionGeometry
    parameters: Any  # of the method's class

    @property
    def literal(self) -> bool:
        """Whether weights come in as the paper prints them, not as multiples of the updates."""
        return getattr(self.parameters, "coefficients", "linear") == "paper"

    @property
    def block(self) -> str:
        return self.name.rsplit(" ", 1)[0]

    @property
    def reads_input(self) -> bool:
        """Whether rotations act on the model space; the printed form has a meaning for query and key only."""
        return getattr(self.parameters, "align_space", "head") == "input" and self.x.role == "q"

    @property
    def nbytes(self) -> int:
        """About what solving it takes: per adapter rotations, moments and factors; Grams of the base."""
        g, n = self.geometry, len(self.adapters)
        modules = [a.modules[m] for s in (self.x, self.y) for a, m in zip(self.adapters, s.modules) if m]
        rank = max(m.rank for m in modules)
        if self.reads_input:
            d = max(m.shape[0 if g.transposed else 1] for m in modules)
            return 8 * (6 * n * 2 * rank * d + 4 * d * d)
        return 8 * (g.n_heads + g.n_kv_heads) * g.head_dim * (6 * n * rank + 2 * g.head_dim)


class Pair(NamedTuple):
    """A planned pair with its Grams."""

    plan: PairPlan
    x: SideGrams
    y: SideGrams
