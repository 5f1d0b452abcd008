"""How a decoder block is wired, as data: all that smoothq knows of an architecture.

A `Site` is one activation tensor and every weight that reads it; a `BlockGraph` lists the sites of
a block in the order of execution. Both name *weights*, not modules: a `WeightRef` says which rows
of which parameter, of which expert, in which orientation, so that a fused qkv, a fused gate_up
and experts in one 3-D parameter are as ordinary as separate linears.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

Edge = Literal["norms", "up_down", "value_output"]


@dataclass(frozen=True)
class WeightRef:
    """A weight matrix (out_features, in_features) inside a block's parameters.

    tensor: the parameter's name within the block. bias: its bias, or None. rows: the output
    features meant, or None for all. expert: the index into a 3-D parameter, or None. transposed:
    stored as (in_features, out_features).
    """

    tensor: str
    bias: str | None = None
    rows: tuple[int, int] | None = None
    expert: int | None = None
    transposed: bool = False

    def view(self, block: nn.Module) -> Tensor:
        """The matrix (out_features, in_features), a view of the block's parameter."""
        stored = block.get_parameter(self.tensor).data
        if self.expert is not None:
            stored = stored[self.expert]
        matrix = stored.t() if self.transposed else stored
        return matrix if self.rows is None else matrix[slice(*self.rows)]

    def bias_view(self, block: nn.Module) -> Tensor | None:
        """The bias (out_features,), a view of the block's parameter, or None."""
        if self.bias is None:
            return None
        stored = block.get_parameter(self.bias).data
        if self.expert is not None:
            stored = stored[self.expert]
        return stored if self.rows is None else stored[slice(*self.rows)]

    @property
    def module(self) -> str:
        """The name of the module that holds the parameter."""
        return self.tensor.rpartition(".")[0]


@dataclass(frozen=True)
class Norm:
    """A normalisation whose output is the site's input. weight, bias: parameter names."""

    weight: str
    bias: str | None = None


@dataclass(frozen=True)
class Heads:
    """Head counts of an attention layer: query heads share key/value heads in equal groups."""

    query: int
    key_value: int
    dim: int


@dataclass(frozen=True)
class Rows:
    """Rows of another weight scale the site's input one to one: up→down, or value→output.

    heads: for value→output, how value rows repeat over the query heads; else None.
    """

    ref: WeightRef
    heads: Heads | None = None


@dataclass(frozen=True)
class Site:
    """One activation tensor and all that reads it: the unit of everything on the input side.

    readers: weights to be quantized. float_readers: weights that read the same tensor and stay
    in float (a router). producer: what can absorb a divisor of this input.
    """

    name: str
    readers: tuple[WeightRef, ...]
    producer: Norm | Rows | None
    float_readers: tuple[WeightRef, ...] = ()

    @property
    def edge(self) -> Edge | None:
        """The kind of the edge from the producer to this site."""
        if self.producer is None:
            return None
        if isinstance(self.producer, Norm):
            return "norms"
        return "value_output" if self.producer.heads else "up_down"

    @property
    def all_readers(self) -> tuple[WeightRef, ...]:
        """Quantized and float readers together."""
        return self.readers + self.float_readers

    @property
    def modules(self) -> tuple[str, ...]:
        """The names of the modules to quantize, each once, in order."""
        return tuple(dict.fromkeys(reader.module for reader in self.readers))


@dataclass(frozen=True)
class BlockGraph:
    """The sites of one decoder block in the order of execution, and who writes its residual."""

    sites: tuple[Site, ...]
    residual_writers: tuple[WeightRef, ...]

    @property
    def value_output(self) -> Site | None:
        """The site between attention and its output projection, if values reach it unchanged."""
        return next((site for site in self.sites if site.edge == "value_output"), None)


@dataclass(frozen=True)
class Family:
    """Models that share a wiring.

    model_types: the config's `model_type` values. block: config and layer index → BlockGraph.
    The other fields are module names in the causal LM. unquantizable: why blocks of this family
    cannot be quantized yet, or None.
    """

    model_types: tuple[str, ...]
    block: Callable[[PretrainedConfig, int], BlockGraph]
    base: str = "model"
    layers: str = "model.layers"
    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    unquantizable: str | None = None


def attention_heads(config: PretrainedConfig) -> Heads:
    """Head counts and width from the config; `head_dim` need not be hidden_size / heads."""
    query = config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // query
    return Heads(query, getattr(config, "num_key_value_heads", None) or query, dim)


def all_finite(tensor: Tensor) -> bool:
    """Whether a float tensor holds neither NaN nor Inf; True for integers."""
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())
