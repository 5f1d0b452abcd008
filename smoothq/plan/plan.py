"""A recipe resolved for one model: the number formats of every site, and the resulting sizes."""

from __future__ import annotations

from collections.abc import Iterator
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
    """How one site of a block is quantized: its input, and the weight of each linear that reads it.

    Attributes:
        site: the activation tensor and the modules that read it.
        input: how that tensor is quantized.
        modules: module name within the block → shape and number format of its weight.
        adds_bias: whether the bias of the norm before the site is folded into its linears. They
            then have a bias, even if the float model's linears have none.
    """

    site: Site
    input: InputSpec
    modules: dict[str, WeightSpec]
    adds_bias: bool

    @property
    def input_name(self) -> str:
        """The name of the site's InputQuantizer within the block: a sibling of the first reader."""
        parent, _, leaf = next(iter(self.modules)).rpartition(".")
        if leaf.isdigit():
            parent = parent.rpartition(".")[
                0
            ]  # a sibling of the ModuleList, not one of its entries
        name = f"{self.site.name.replace('.', '_')}_input"
        return f"{parent}.{name}" if parent else name


@dataclass(frozen=True)
class BlockPlan:
    """How one decoder block is quantized.

    Attributes:
        graph: the block's wiring.
        sites: the sites with at least one quantized linear.
        value_rotation: the rotation of each attention head's values (R2), or None.
        unquantized_bytes: bytes of the quantized linears' weights in the source's dtype.
        kept_elements: weights of the linears that the recipe keeps in float.
        kept_width: total input width of the sites whose linears are all kept in float.
        new_biases: float linears, such as routers, that gain a bias because the bias of the norm
            before them is folded into them.
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
        """The attention module's name within the block: the parent of the output projection."""
        assert self.graph.value_output is not None
        return self.graph.value_output.all_readers[0].module.rpartition(".")[0]

    @property
    def weight_specs(self) -> list[WeightSpec]:
        """Shape and number format of every quantized weight of the block, in the sites' order."""
        return [spec for site in self.sites for spec in site.modules.values()]


@dataclass(frozen=True)
class Bits:
    """Average bits per element over all linears; scales, zero points and multipliers count.

    Attributes:
        weight: bits per weight.
        activation: bits per activation in prefill.
        activation_decode: bits per activation when one token is decoded.
        cached: bits per number in the KV cache; tokens that it holds in float do not count.
    """

    weight: float
    activation: float
    activation_decode: float
    cached: float = FLOAT_BITS


@dataclass(frozen=True)
class Plan:
    """A recipe resolved for one model.

    Attributes:
        recipe: the recipe as given; linears whose weights the model's code reads directly are
            added to its `keep`.
        family: the model's architecture.
        parts: the full names of the model's decoder, layers, embedding, head and norms.
        blocks: the plan of every decoder block, in order.
        residual_rotation: the rotation of the residual stream (R1), or None. It is folded into the
            weights of the blocks and applied online at the two ends: to the input of the first
            block, and inverted before the final norm. Weights outside the blocks are unchanged.
        attention: how attention and the KV cache are quantized in every block, or None for float.
        bits: average bits per weight, activation and cached number.
        notes: messages for the user, one line each.
        stored_dtype: the recipe's dtype; for "auto" the dtype of most of the model's floats. It is
            also the dtype of float tensors that the source does not have.
        float_elements: how many numbers of the checkpoint stay in float.
        float_bytes: their bytes; for the dtype "auto" each tensor counts in its source's dtype.
        tables: (rows, columns) of each matrix stored in 8 bits with one scale per row: the
            embedding, and the head if it is not tied. Empty if they stay in float.
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

    def block_name(self, index: int) -> str:
        """The full name of a decoder block, such as `model.layers.0`."""
        return f"{self.parts.layers}.{index}"

    def sites(self) -> Iterator[tuple[int, BlockPlan, SitePlan]]:
        """Yield (block index, its plan, site) for every site of the model, block by block."""
        for index, block in enumerate(self.blocks):
            for site in block.sites:
                yield index, block, site

    def linears(self) -> Iterator[tuple[str, WeightSpec, InputSpec]]:
        """Yield (full name, weight, input) for every quantized linear, block by block."""
        for index, _, site in self.sites():
            for module, spec in site.modules.items():
                yield f"{self.block_name(index)}.{module}", spec, site.input

    @property
    def online_rotations(self) -> list[Hadamard]:
        """The distinct rotations that are applied while the model runs."""
        rotations = [*site_rotations(self.blocks), self.residual_rotation]
        if self.attention is not None:
            rotations.append(self.attention.rotation)
        return list(dict.fromkeys(rotation for rotation in rotations if rotation is not None))

    @property
    def norm_offset(self) -> float:
        """The constant that the model's norms add to their weight, such as 1 in Gemma."""
        return norm_offset(block.graph for block in self.blocks)

    @property
    def linear_bytes(self) -> int:
        """Bytes of all quantized weights with their scales."""
        return sum(spec.stored_bits for _, spec, _ in self.linears()) // 8

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors of the checkpoint."""
        tables = sum(rows * (columns + 2) for rows, columns in self.tables)
        return self.linear_bytes + tables + self.float_bytes


def site_rotations(blocks: tuple[BlockPlan, ...]) -> list[Hadamard | None]:
    """The online rotation of every site's input, None for a site without one."""
    return [site.input.rotation for block in blocks for site in block.sites]


def weight_specs(blocks: tuple[BlockPlan, ...]) -> list[WeightSpec]:
    """Shape and number format of every quantized weight of some blocks, in order."""
    return [spec for block in blocks for spec in block.weight_specs]
