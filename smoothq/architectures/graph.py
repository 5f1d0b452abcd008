"""How a decoder block is wired, as data: all that smoothq knows of an architecture.

A `Site` is one activation tensor and every weight that reads it; a `BlockGraph` lists the sites of
a block in the order of execution. Both name *weights*, not modules: a `WeightRef` says which rows
of which parameter, so that a fused qkv and a fused gate_up are as ordinary as separate linears.
The names are those of an opened block (`layout.open_block`), in which every matrix is an
`nn.Linear` of its own, experts included.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from ..errors import UnsupportedModelError

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
    def token_groups(self) -> tuple[tuple[str, ...], ...]:
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
        """What sites that run side by side share: the `down` of `down.0`, `down.1` and so on."""
        return self.name.partition(".")[0]


@dataclass(frozen=True)
class BlockGraph:
    """The sites of one decoder block in the order of execution, and who writes its residual.

    residual_writers: empty where a norm stands between a writer and the stream, so that no
    rotation of the stream can be folded into it.
    """

    sites: tuple[Site, ...]
    residual_writers: tuple[WeightRef, ...]

    def keeping(self, keeps: Callable[[str], bool]) -> BlockGraph:
        """The graph in which some modules, told by name, are read as a router's weights are."""

        def without(site: Site) -> Site:
            kept = tuple(reader for reader in site.readers if keeps(reader.module))
            readers = tuple(reader for reader in site.readers if reader not in kept)
            return replace(site, readers=readers, float_readers=site.float_readers + kept)

        return replace(self, sites=tuple(without(site) for site in self.sites))

    @property
    def value_output(self) -> Site | None:
        """The site between attention and its output projection, if values reach it unchanged."""
        return next((site for site in self.sites if site.edge == "value_output"), None)


def takes_rotation(graphs: Iterable[BlockGraph]) -> bool:
    """Whether a rotation of the residual stream can be folded into all blocks of a model."""
    return all(graph.residual_writers for graph in graphs)


def norm_offset(graphs: Iterable[BlockGraph]) -> float:
    """What the norms of a model add to their weight, as those of its blocks do."""
    sites = (site for graph in graphs for site in graph.sites)
    return next((s.producer.offset for s in sites if isinstance(s.producer, Norm)), 0.0)


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
    def first_block(self) -> str:
        """The block that the residual stream enters, whatever way it came."""
        return f"{self.layers}.0"

    @property
    def entering(self) -> tuple[str, ...]:
        """The embeddings whose rows are added up to what enters the first block."""
        return (self.embedding, *([] if self.positions is None else [self.positions]))

    def folds_head(self, model: PreTrainedModel) -> bool:
        """Whether a head that is not the embedding can undo a rotation of the residual stream.

        Not where the final norm has a bias.
        """
        return Norm(f"{self.final_norm}.weight").bias_view(model) is None


def _refuses_none(config: PretrainedConfig) -> None:
    """No reason to refuse a config."""


@dataclass(frozen=True)
class Family:
    """Models that share a wiring.

    model_types: the config's `model_type` values. block: config and layer index → BlockGraph.
    centred: its norms subtract the mean. returns_tuple: a block returns its output inside a tuple.
    flattens: a block joins the tokens of all sequences in front of some of its linears. refuses:
    config → why such a model cannot be quantized, or None. sums_at_entry: what enters the first
    block is a sum of multiples of `Parts.entering`, so that rotating those rotates it. The other
    fields are names within the decoder, as in `Parts`.
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
    sums_at_entry: bool = True
    refuses: Callable[[PretrainedConfig], str | None] = _refuses_none

    def graph(self, config: PretrainedConfig, index: int, block: nn.Module) -> BlockGraph:
        """The wiring of a model's own block, opened, on any device.

        Head counts are those of its tensors: a config may hold fields that its model does not use.
        Raises UnsupportedModelError where config and tensors do not fit in another way.
        """
        graph = self.block(config, index)
        heads = _heads_of_tensors(graph, config, block)
        if heads is not None:
            graph = self.block(_with_heads(config, heads), index)
        _check_fits(graph, config, index, block)
        return graph

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

    def folds_offline(self, model: PreTrainedModel) -> bool:
        """Whether a rotation of the residual stream folds into embeddings and an untied head."""
        return self.sums_at_entry and self.parts(model).folds_head(model)


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
    """Head counts and width from the config; `head_dim` need not be hidden_size / heads.

    What the model has may differ: `Family.graph` goes by its tensors.
    """
    query = config.num_attention_heads

    def named(field: str, otherwise: int) -> int:
        value = getattr(config, field, None)
        return value if isinstance(value, int) and value > 0 else otherwise

    dim = named("head_dim", config.hidden_size // query)
    return Heads(query, named("num_key_value_heads", query), dim)


def _heads_of_tensors(
    graph: BlockGraph, config: PretrainedConfig, block: nn.Module
) -> Heads | None:
    """Head counts by the shapes of values and output projection; None where they do not tell."""
    site = graph.value_output
    if site is None or not isinstance(site.producer, Rows):
        return None
    try:
        width = site.all_readers[0].view(block).shape[1]
        values = len(block.get_parameter(site.producer.refs[0].tensor))
    except AttributeError:  # a name that the block does not have, which `_check_fits` refuses
        return None
    query = config.num_attention_heads
    # Of q, k and v in one matrix, what is not q is k and v, in equal shares.
    fused = site.producer.refs[0].rows is not None
    key_values = (values - width) // 2 if fused else values
    if width % query or key_values <= 0 or key_values % (width // query):
        return None
    dim = width // query
    return None if query % (key_values // dim) else Heads(query, key_values // dim, dim)


def _with_heads(config: PretrainedConfig, heads: Heads) -> PretrainedConfig:
    """A config that says so; itself where it does."""
    if attention_heads(config) == heads:
        return config
    told: Any = copy.copy(config)
    if attention_heads(config).dim != heads.dim and hasattr(config, "head_dim"):
        told.head_dim = heads.dim
    told.num_key_value_heads = heads.key_value
    made: PretrainedConfig = told
    return made


def _check_fits(graph: BlockGraph, config: PretrainedConfig, index: int, block: nn.Module) -> None:
    """Raise UnsupportedModelError where a graph, made from a config, is not a block's own."""
    for site in graph.sites:
        what = _misfit(site, block)
        if what is not None:
            raise UnsupportedModelError(
                f"{config.model_type}: block {index} is not what its config says: {what}; "
                "correct config.json, or take out the field that its model does not use"
            )


def _misfit(site: Site, block: nn.Module) -> str | None:
    """How a site differs from a block's tensors, or None."""
    try:
        widths = {reader.view(block).shape[1] for reader in site.all_readers}
        made = _channels(site, block)
    except AttributeError as error:
        return f"{site.name}: {error}"
    if len(widths) != 1:
        return f"what reads {site.name} has {sorted(widths)} input channels"
    (width,) = widths
    if made is not None and made != width:
        return f"{site.name} has {width} input channels, and {made} are made for it"
    routed = [reader.module for reader in site.readers if reader.routed]
    stacks = {module.rpartition(".")[0] for module in routed if module[-1].isdigit()}
    held = sum(len(list(block.get_submodule(stack).children())) for stack in stacks)
    if site.reads == "stream" and held > len(routed):
        return f"{held} experts where {len(routed)} are expected"
    return None


def _channels(site: Site, block: nn.Module) -> int | None:
    """The input channels of a site that its producer makes, or None where it has none."""
    producer = site.producer
    if producer is None:
        return None
    if isinstance(producer, Norm):
        return block.get_parameter(producer.weight).numel()
    rows = sum(len(ref.view(block)) for ref in producer.refs)
    if producer.heads is None:
        return rows
    heads, last = producer.heads, producer.refs[-1]
    # Rows that stop short of a matrix's end were counted with heads that it does not have.
    end = len(block.get_parameter(last.tensor))
    reached = last.rows is None or last.rows.stop in (None, end)
    return heads.query * heads.dim if reached and rows == heads.key_value * heads.dim else 0


def all_finite(tensor: Tensor) -> bool:
    """Whether a float tensor holds neither NaN nor Inf; True for integers."""
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())
