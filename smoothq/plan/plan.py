"""What a recipe comes to for one model: what each site gets, and the bits counted."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..architectures import (
    BlockGraph,
    Family,
    Parts,
    Site,
)
from ..architectures.graph import (
    norm_offset,
)
from ..modules import (
    AttentionSpec,
    InputSpec,
    WeightSpec,
)
from ..recipe.recipe import FLOAT_BITS, Recipe
from ..transforms.hadamard import Hadamard


@dataclass(frozen=True)
class SitePlan:
    """One site of one block: how its input is quantized, and the form of each linear's weight.

    modules: module name within the block → the form of its weight. adds_bias: the linears take in
    the bias of the norm before them, and have one even where the float model's have none.
    """

    site: Site
    input: InputSpec
    modules: dict[str, WeightSpec]
    adds_bias: bool

    @property
    def input_name(self) -> str:
        """The name of the site's InputQuantizer within the block: beside its first reader."""
        parent, _, leaf = next(iter(self.modules)).rpartition(".")
        if leaf.isdigit():
            parent = parent.rpartition(".")[0]  # beside a list or a sequence, not in it
        name = f"{self.site.name.replace('.', '_')}_input"
        return f"{parent}.{name}" if parent else name


@dataclass(frozen=True)
class BlockPlan:
    """One decoder block: its wiring, its sites, and the rotation of its values (or None).

    unquantized_bytes: of the weights of its sites, as they come.
    kept_elements: of the linears that the recipe keeps in float; kept_width: of the tensors that
    only such linears read. new_biases: linears in float, such as routers, that take in a norm's
    bias and had none.
    """

    graph: BlockGraph
    sites: tuple[SitePlan, ...]
    value_rotation: Hadamard | None
    unquantized_bytes: int
    kept_elements: int
    kept_width: int
    new_biases: tuple[str, ...]

    @property
    def attention(self) -> str:
        """The name of the attention module: the one that holds the reader of its values."""
        assert self.graph.value_output is not None
        return self.graph.value_output.all_readers[0].module.rpartition(".")[0]


@dataclass(frozen=True)
class Bits:
    """Bits an element with every scale, zero and multiplier counted, averaged over all linears.

    cached: of a key or value in the KV cache, without the tokens that stay in float.
    """

    weight: float
    activation: float
    activation_decode: float
    cached: float = FLOAT_BITS


@dataclass(frozen=True)
class Plan:
    """A recipe resolved for one model.

    recipe: as it was given, with what the model's own code asks for added to `keep`. parts: where
    the model's parts are. residual_rotation: R1, or None, as in families whose stream takes none;
    it runs online where the stream enters the first block, and back before the final norm, so
    that nothing outside the blocks knows of it. attention: of every block, or None where it stays
    float. notes: what the user should know. stored_dtype: of most of what stays float, and of
    what is new; float_elements: how many numbers stay float, float_bytes: their bytes, each in
    the dtype that it came in unless the recipe names one. tables: rows of what is stored in 8
    bits with a scale a row: the embedding, and an untied head.
    """

    recipe: Recipe
    family: Family
    parts: Parts
    blocks: tuple[BlockPlan, ...]
    residual_rotation: Hadamard | None
    attention: AttentionSpec | None
    bits: Bits
    notes: tuple[str, ...]
    stored_dtype: torch.dtype
    float_elements: int
    float_bytes: int
    tables: tuple[tuple[int, int], ...]

    @property
    def online_rotations(self) -> list[Hadamard]:
        """Every rotation that runs with the model, each once."""
        found = [*site_rotations(self.blocks), self.residual_rotation]
        if self.attention is not None:
            found.append(self.attention.rotation)
        return list(dict.fromkeys(rotation for rotation in found if rotation is not None))

    @property
    def norm_offset(self) -> float:
        """What the model's norms add to their weight."""
        return norm_offset(block.graph for block in self.blocks)

    @property
    def linear_bytes(self) -> int:
        """Bytes of all quantized weights with their scales."""
        return sum(spec.stored_bits for spec in weight_specs(self.blocks)) // 8

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors of the checkpoint."""
        tables = sum(rows * (columns + 2) for rows, columns in self.tables)
        return self.linear_bytes + tables + self.float_bytes


def site_rotations(blocks: tuple[BlockPlan, ...]) -> list[Hadamard | None]:
    """The online rotation of each site's input, block by block."""
    return [site.input.rotation for block in blocks for site in block.sites]


def weight_specs(blocks: tuple[BlockPlan, ...]) -> list[WeightSpec]:
    """The specification of every quantized linear, block by block."""
    return [spec for block in blocks for site in block.sites for spec in site.modules.values()]
