"""How a decoder block is wired, as data: all that smoothq knows of an architecture.

A `Site` is one activation tensor and every weight that reads it; a `BlockGraph` lists the sites of
a block in the order of execution. Both name *weights*, not modules: a `WeightRef` says which rows
of which parameter, so that a fused qkv and a fused gate_up are as ordinary as separate linears.
The names are those of an opened block (`layout.open_block`), in which every matrix is an
`nn.Linear` of its own, experts included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

Edge = Literal["norms", "up_down", "value_output"]
Reads = Literal["stream", "values", "inner"]
HOMOGENEOUS_ACTIVATIONS = frozenset({"relu"})  # f(x / s) = f(x) / s for s > 0


@dataclass(frozen=True)
class WeightRef:
    """A weight matrix (out_features, in_features) inside a block's parameters.

    tensor: the parameter's name within the block; a bias stands beside it where the module has
    one. rows: the output features meant, or None for all. routed: only the tokens that a router
    sends to this expert reach it.
    """

    tensor: str
    rows: slice | None = None
    routed: bool = False

    def view(self, block: nn.Module) -> Tensor:
        """The matrix (out_features, in_features), a view of the block's parameter."""
        matrix = block.get_parameter(self.tensor).data
        return matrix if self.rows is None else matrix[self.rows]

    def bias_view(self, block: nn.Module) -> Tensor | None:
        """The bias (out_features,), a view of the block's parameter, or None."""
        bias = getattr(block.get_submodule(self.module), "bias", None)
        if not isinstance(bias, Tensor):
            return None
        return bias.data if self.rows is None else bias.data[self.rows]

    @property
    def module(self) -> str:
        """The name of the module that holds the parameter."""
        return self.tensor.rpartition(".")[0]


@dataclass(frozen=True)
class Norm:
    """A normalisation whose output is the site's input.

    weight: the parameter's name; a bias stands beside it where the norm has one. offset: what the
    norm adds to its weight before it multiplies (1 in Gemma).
    """

    weight: str
    offset: float = 0.0

    def bias_view(self, block: nn.Module) -> Tensor | None:
        """The bias (width,), a view of the block's parameter, or None."""
        return WeightRef(self.weight).bias_view(block)


@dataclass(frozen=True)
class Heads:
    """Head counts of an attention layer: query heads share key/value heads in equal groups."""

    query: int
    key_value: int
    dim: int


@dataclass(frozen=True)
class Rows:
    """Rows of other weights scale the site's input one to one: up→down, or value→output.

    refs: their rows, one after the other, are the input's channels. heads: for value→output, how
    value rows repeat over the query heads; else None.
    """

    refs: tuple[WeightRef, ...]
    heads: Heads | None = None


@dataclass(frozen=True)
class Site:
    """One activation tensor and all that reads it: the unit of everything on the input side.

    reads: what the tensor is: the residual stream (behind a norm, mostly), attention's values, or
    what is inside the MLP. readers: weights to be quantized. producer: what can absorb a divisor
    of this input. float_readers: weights that read the same tensor and stay in float (a router).
    """

    name: str
    reads: Reads
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

    @property
    def lanes(self) -> tuple[tuple[str, ...], ...]:
        """The modules again, those together that the same tokens reach: each expert is alone."""
        routed = dict.fromkeys(reader.module for reader in self.readers if reader.routed)
        shared = tuple(module for module in self.modules if module not in routed)
        return (*([shared] if shared else []), *((module,) for module in routed))

    @property
    def routed(self) -> bool:
        """Whether a router decides which tokens reach some of the readers."""
        return any(reader.routed for reader in self.readers)

    @property
    def stage(self) -> str:
        """What sites that run side by side share: the `down` of `down.0`, `down.1`, …"""
        return self.name.partition(".")[0]


@dataclass(frozen=True)
class BlockGraph:
    """The sites of one decoder block in the order of execution, and who writes its residual.

    residual_writers: empty where a norm stands between a writer and the stream, so that no
    rotation of the stream can be folded into it.
    """

    sites: tuple[Site, ...]
    residual_writers: tuple[WeightRef, ...]

    @property
    def value_output(self) -> Site | None:
        """The site between attention and its output projection, if values reach it unchanged."""
        return next((site for site in self.sites if site.edge == "value_output"), None)


def takes_rotation(graphs: Iterable[BlockGraph]) -> bool:
    """Whether a rotation of the residual stream can be folded into all blocks of a model."""
    return all(graph.residual_writers for graph in graphs)


@dataclass(frozen=True)
class Parts:
    """The full names, in one causal LM, of what a pass over its blocks must find.

    decoder: the module whose forward takes embeddings through the blocks. positions: learned
    position embeddings that are added to the stream, or None. entry_norm: a norm between
    embedding and blocks, or None.
    """

    decoder: str
    layers: str
    embedding: str
    final_norm: str
    head: str
    positions: str | None
    entry_norm: str | None

    @property
    def entry(self) -> str:
        """The module whose output enters the stack of blocks, but for learned positions."""
        return self.entry_norm or self.embedding

    def fold(self, model: PreTrainedModel) -> bool:
        """Whether a rotation of the residual stream folds into the weights at both of its ends.

        Not where one matrix is both ends, or not even two would do.
        """
        return not is_tied(model) and self.folds_untied(model)

    def folds_untied(self, model: PreTrainedModel) -> bool:
        """Whether it would with an embedding and a head of their own.

        Not where a norm stands behind the embedding, or where the head has no bias to take the
        final norm's.
        """
        bias = Norm(f"{self.final_norm}.weight").bias_view(model)
        return self.entry_norm is None and bias is None


@dataclass(frozen=True)
class Family:
    """Models that share a wiring.

    model_types: the config's `model_type` values. block: config and layer index → BlockGraph.
    centred: its norms subtract the mean. returns_tuple: a block returns its output inside a tuple.
    flattens: a block joins the tokens of all sequences in front of some of its linears. refuses:
    config → why such a model cannot be quantized, or None. The other fields are names within the
    decoder, as in `Parts`.
    """

    model_types: tuple[str, ...]
    block: Callable[[PretrainedConfig, int], BlockGraph]
    layers: str = "layers"
    final_norm: str = "norm"
    positions: str | None = None
    entry_norm: str | None = None
    centred: bool = False
    returns_tuple: bool = False
    flattens: bool = False
    refuses: Callable[[PretrainedConfig], str | None] = lambda config: None

    def parts(self, model: PreTrainedModel) -> Parts:
        """Where this family's parts are in a model."""
        names = {id(module): name for name, module in model.named_modules()}
        decoder = names[id(model.get_decoder())]

        def within(name: str | None) -> str | None:
            return None if name is None else f"{decoder}.{name}"

        return Parts(
            decoder=decoder,
            layers=f"{decoder}.{self.layers}",
            embedding=names[id(model.get_input_embeddings())],
            final_norm=f"{decoder}.{self.final_norm}",
            head=names[id(model.get_output_embeddings())],
            positions=within(self.positions),
            entry_norm=within(self.entry_norm),
        )


def text_config(model: PreTrainedModel) -> PretrainedConfig:
    """The config of the model's decoder."""
    return model.config.get_text_config(decoder=True)


def is_tied(model: PreTrainedModel) -> bool:
    """Whether the head is the embedding, whatever the config says."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    tied = model.all_tied_weights_keys
    return tied.get(f"{names[id(head)]}.weight") == f"{names[id(embedding)]}.weight"


def attention_heads(config: PretrainedConfig) -> Heads:
    """Head counts and width from the config; `head_dim` need not be hidden_size / heads."""
    query = config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // query
    return Heads(query, getattr(config, "num_key_value_heads", None) or query, dim)


def all_finite(tensor: Tensor) -> bool:
    """Whether a float tensor holds neither NaN nor Inf; True for integers."""
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())
