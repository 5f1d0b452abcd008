"""A recipe resolved for one model: the number formats of every site, and the resulting sizes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import nn

from ..architectures import BlockGraph, Parts, Site
from ..architectures.graph import norm_offset
from ..checkpoint.weight_files import Spec
from ..modules import AttentionSpec, InputSpec, WeightSpec
from ..recipe.recipe import FLOAT_BITS, Recipe
from ..transforms.hadamard import Hadamard
from .wiring import Wiring

PREFILL_TOKENS = 2048  # length of the sequence among whose tokens shared scales are divided


@dataclass(frozen=True)
class SitePlan:
    """How one site of a block is quantized: its input, and the weight of each linear that reads it.

    Attributes:
        site: the activation tensor and the modules that read it.
        input: how that tensor is quantized.
        modules: module name within the block → shape and number format of its weight.
        adds_bias: whether the bias of the norm before the site is folded into its linears. They
            then have a bias, even if the float model's linears have none.
        parent: the name within the block of the module that the site's InputQuantizer is put into;
            empty for the block itself.
    """

    site: Site
    input: InputSpec
    modules: dict[str, WeightSpec]
    adds_bias: bool
    parent: str

    @property
    def elements(self) -> int:
        """The number of quantized weights."""
        return sum(spec.elements for spec in self.modules.values())

    @property
    def stored_bits(self) -> int:
        """Bits of the quantized weights as stored, with their scales."""
        return sum(spec.stored_bits for spec in self.modules.values())

    @property
    def input_name(self) -> str:
        """The name of the site's InputQuantizer within the block."""
        name = f"{self.site.name.replace('.', '_')}_input"
        return f"{self.parent}.{name}" if self.parent else name


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
        bias_elements: elements of the biases that linears gain, quantized ones included.
    """

    graph: BlockGraph
    sites: tuple[SitePlan, ...]
    value_rotation: Hadamard | None
    unquantized_bytes: int
    kept_elements: int
    kept_width: int
    new_biases: tuple[str, ...]
    bias_elements: int

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
class TowerLinear:
    """How a linear of a vision or audio tower is quantized: to nearest, by itself.

    Attributes:
        weight: shape and number format of its weight.
        input: how its input is quantized.
        unquantized_bytes: bytes of its weight in the source's dtype.
    """

    weight: WeightSpec
    input: InputSpec
    unquantized_bytes: int


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
        wiring: what is known of the model before any recipe.
        blocks: the plan of every decoder block, in order.
        residual_rotation: the rotation of the residual stream (R1), or None. It is folded into the
            weights of the blocks and applied online at the two ends: to the input of the first
            block, and inverted before the final norm. Weights outside the blocks are unchanged.
        attention: how attention and the KV cache are quantized in every block, or None for float.
        towers: the quantized linears of vision and audio towers, by their full names.
        notes: messages for the user, one line each.
    """

    recipe: Recipe
    wiring: Wiring
    blocks: tuple[BlockPlan, ...]
    residual_rotation: Hadamard | None
    attention: AttentionSpec | None
    towers: dict[str, TowerLinear] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def parts(self) -> Parts:
        """The full names of the model's decoder, layers, embedding, head and norms."""
        return self.wiring.parts

    def named_blocks(self, model: nn.Module) -> Iterator[tuple[str, nn.Module, BlockPlan]]:
        """Yield (full name, module in `model`, plan) for every decoder block."""
        for index, block in enumerate(self.blocks):
            name = self.parts.block_name(index)
            yield name, model.get_submodule(name), block

    @cached_property
    def sites(self) -> tuple[SitePlan, ...]:
        """All sites of the model, block by block."""
        return tuple(site for block in self.blocks for site in block.sites)

    def named_sites(self) -> Iterator[tuple[str, SitePlan]]:
        """Yield (full name of its block, site) for every site of the model, block by block."""
        for index, block in enumerate(self.blocks):
            for site in block.sites:
                yield self.parts.block_name(index), site

    def linears(self) -> Iterator[tuple[str, WeightSpec, InputSpec]]:
        """Yield (full name, weight, input) for every quantized linear, block by block."""
        for block, site in self.named_sites():
            for module, spec in site.modules.items():
                yield f"{block}.{module}", spec, site.input

    @property
    def online_rotations(self) -> list[Hadamard]:
        """The distinct rotations that are applied while the model runs."""
        rotations = [*(site.input.rotation for site in self.sites), self.residual_rotation]
        if self.attention is not None:
            rotations.append(self.attention.rotation)
        return list(dict.fromkeys(rotation for rotation in rotations if rotation is not None))

    @property
    def norm_offset(self) -> float:
        """The constant that the model's norms add to their weight, such as 1 in Gemma."""
        return norm_offset(self.wiring.graphs)

    @property
    def stored_dtype(self) -> torch.dtype:
        """The recipe's dtype; for `auto` the dtype of most of the model's floats.

        It is also the dtype of float tensors that the source does not have.
        """
        dtype = self.recipe.dtype
        return self.wiring.dtype if dtype == "auto" else getattr(torch, dtype)

    @property
    def tables(self) -> tuple[tuple[int, int], ...]:
        """(rows, columns) of each matrix stored in 8 bits with one scale per row.

        They are the embedding, and the head if it is not tied. Empty if they stay in float.
        """
        names = self.parts.ends
        if self.recipe.embeddings == FLOAT_BITS or any(map(self.recipe.keeps, names)):
            return ()
        apart = names[:1] if self.wiring.tied else names
        specs = (self.wiring.tensors[f"{name}.weight"] for name in apart)
        return tuple((spec.shape[0], spec.shape[1]) for spec in specs)

    @cached_property
    def bits(self) -> Bits:
        """Average bits per weight, activation and cached number.

        Where linears of towers are quantized, all of them count.
        """
        inputs = [*(site.input for site in self.sites), *(t.input for t in self.towers.values())]
        kept = sum(block.kept_elements for block in self.blocks)
        kept_width = sum(block.kept_width for block in self.blocks)
        for name in self.wiring.towers if self.towers else ():
            if name not in self.towers:
                spec = self.wiring.tensors[f"{name}.weight"]
                kept, kept_width = kept + spec.elements, kept_width + spec.shape[1]
        stored = self._stored_bits
        stored += 8 * self.stored_dtype.itemsize * kept
        width = sum(spec.width for spec in inputs) + kept_width

        def activation(tokens: int) -> float:
            bits = sum(spec.bits * spec.width + spec.scale_bits(tokens) for spec in inputs)
            return (bits + FLOAT_BITS * kept_width) / width

        weight = stored / (self._quantized_elements + kept)
        cache = None if self.attention is None else self.attention.cache
        cached = FLOAT_BITS if cache is None else cache.stored_bits(self.wiring.head_dim)
        return Bits(weight, activation(PREFILL_TOKENS), activation(1), cached)

    @property
    def float_elements(self) -> int:
        """How many numbers of the checkpoint stay in float."""
        kept = sum(spec.elements for spec in self._uncoded.values()) - self._quantized_elements
        return kept + self._bias_elements

    @property
    def float_bytes(self) -> int:
        """Their bytes; for the dtype `auto` each tensor counts in its source's dtype."""
        if self.recipe.dtype != "auto":
            return self.float_elements * self.stored_dtype.itemsize
        nbytes = sum(spec.nbytes for spec in self._uncoded.values())
        nbytes -= sum(block.unquantized_bytes for block in self.blocks)
        nbytes -= sum(linear.unquantized_bytes for linear in self.towers.values())
        return nbytes + self._bias_elements * self.stored_dtype.itemsize

    @property
    def linear_bytes(self) -> int:
        """Bytes of all quantized weights with their scales."""
        return self._stored_bits // 8

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors of the checkpoint."""
        tables = sum(rows * (columns + 2) for rows, columns in self.tables)
        return self.linear_bytes + tables + self.float_bytes

    @property
    def _uncoded(self) -> dict[str, Spec]:
        """The model's tensors without those in `tables`."""
        names = self.parts.ends if self.tables else ()
        coded = {f"{name}.weight" for name in names}
        return {name: spec for name, spec in self.wiring.tensors.items() if name not in coded}

    @property
    def _stored_bits(self) -> int:
        towers = sum(linear.weight.stored_bits for linear in self.towers.values())
        return towers + sum(site.stored_bits for site in self.sites)

    @property
    def _quantized_elements(self) -> int:
        towers = sum(linear.weight.elements for linear in self.towers.values())
        return towers + sum(site.elements for site in self.sites)

    @property
    def _bias_elements(self) -> int:
        return sum(block.bias_elements for block in self.blocks)
