"""The wiring of a decoder block as data; nothing else in smoothq depends on the architecture.

A `Site` is one activation tensor and every weight that reads it; a `BlockGraph` lists the sites of
a block in the order of execution. Both name *weights*, not modules: a `WeightRef` is some rows of a
parameter, so that a fused qkv or gate_up is described like separate linears. All names are those of
a linearized block (`linearize.linearize_block`), in which every matrix is an `nn.Linear`, also
those of experts.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from ..compat import tied_weights
from ..errors import UnsupportedModelError
from ..moved import READS

Edge = Literal["norms", "up_down", "value_output"]
Reads = Literal["residual", "attention", "mlp"]
HOMOGENEOUS_ACTIVATIONS = frozenset({"relu"})  # f(x / s) = f(x) / s for s > 0


@dataclass(frozen=True)
class WeightRef:
    """A weight matrix (out_features, in_features): a parameter of a block, or some of its rows.

    Attributes:
        tensor: the parameter's name within the block, `….weight`.
        rows: the output features that are meant, or None for all.
        routed: whether the matrix is an expert's, which only the tokens routed to it reach.
        multiple: 0 where the matrix reads the site's input; a number of its own for each tensor
            that is that input times a factor (Falcon-H1's multipliers).
    """

    tensor: str
    rows: slice | None = None
    routed: bool = False
    multiple: int = 0

    def view(self, block: nn.Module) -> Tensor:
        """The matrix (out_features, in_features), as a view of the block's parameter."""
        matrix = block.get_parameter(self.tensor).data
        return matrix if self.rows is None else matrix[self.rows]

    def bias_view(self, block: nn.Module) -> Tensor | None:
        """The bias (out_features,) beside it, as a view of the block's parameter, or None."""
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
    """The norm (RMSNorm or LayerNorm) whose output is a site's input.

    Attributes:
        weight: the parameter's name within the block.
        offset: the norm multiplies by `offset + weight` (1 in Gemma, else 0).
    """

    weight: str
    offset: float = 0.0

    def bias_view(self, block: nn.Module) -> Tensor | None:
        """The norm's bias (width,), as a view of the block's parameter, or None."""
        return WeightRef(self.weight).bias_view(block)


@dataclass(frozen=True)
class Heads:
    """The heads of an attention layer; query heads share key/value heads in equal groups.

    Attributes:
        query: query heads.
        key_value: key/value heads, a divisor of `query`.
        dim: channels of a head.
    """

    query: int
    key_value: int
    dim: int


@dataclass(frozen=True)
class Rows:
    """Rows of earlier weights that a site's input channels are proportional to, one to one.

    Scaling a row scales its channel: up→down of an MLP, or value→output of an attention.

    Attributes:
        refs: the weights; their rows, one after the other, belong to the input's channels.
        heads: for value→output, how value rows repeat over the query heads; None for up→down.
        turns: whether a rotation of each head's values arrives at the input as it is. False where
            attention's output is multiplied channel by channel, as by a gate.
    """

    refs: tuple[WeightRef, ...]
    heads: Heads | None = None
    turns: bool = True


@dataclass(frozen=True)
class Site:
    """One activation tensor of a block and every weight that reads it.

    Inputs are smoothed, rotated and quantized by site: all readers see the same tensor.

    Attributes:
        name: within the block, such as `qkv`, `down` or `down.3`.
        reads: what the tensor is: the residual stream, mostly through a norm; the output of
            attention; or the intermediate activation of an MLP.
        readers: the weights that are quantized.
        producer: the norm or the rows that a divisor of this input can be folded into, or None.
        float_readers: weights that read the same tensor and stay in float (a router's).
    """

    name: str
    reads: Reads
    readers: tuple[WeightRef, ...]
    producer: Norm | Rows | None
    float_readers: tuple[WeightRef, ...] = ()

    def __post_init__(self) -> None:
        """Replace a word for `reads` of an earlier version, with a warning."""
        if self.reads in READS:
            word: Any = READS[self.reads]
            message = f'Site(reads="{self.reads}") is now reads="{word}"'
            warnings.warn(message, DeprecationWarning, stacklevel=3)
            object.__setattr__(self, "reads", word)

    @property
    def heads(self) -> Heads | None:
        """The heads that the input's channels are values of; None where no value rows make them."""
        return self.producer.heads if isinstance(self.producer, Rows) else None

    @property
    def turns_values(self) -> bool:
        """Whether the input's channels are values that can be rotated per head, in advance."""
        producer = self.producer
        return isinstance(producer, Rows) and producer.heads is not None and producer.turns

    @property
    def edge(self) -> Edge | None:
        """The kind of the edge from the producer to this site; None without a producer."""
        if self.producer is None:
            return None
        if isinstance(self.producer, Norm):
            return "norms"
        return "value_output" if self.heads else "up_down"

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
        """The modules in groups that read the same tensor: each expert is a group of its own."""
        groups: dict[int | str, dict[str, None]] = {}
        for reader in sorted(self.readers, key=lambda reader: reader.routed):
            key = reader.module if reader.routed else reader.multiple
            groups.setdefault(key, {})[reader.module] = None
        return tuple(tuple(group) for group in groups.values())

    @property
    def routed(self) -> bool:
        """Whether some of the readers belong to experts, which only routed tokens reach."""
        return any(reader.routed for reader in self.readers)

    @property
    def stage(self) -> str:
        """The name without an expert's number: `down` for `down.0` and `down.1`."""
        return self.name.partition(".")[0]


@dataclass(frozen=True)
class BlockGraph:
    """The wiring of one decoder block.

    Attributes:
        sites: in the order of execution.
        residual_writers: the weights whose outputs are added to the residual stream. Empty where a
            norm stands between one of them and the stream: then no rotation of the stream can be
            folded into them.
    """

    sites: tuple[Site, ...]
    residual_writers: tuple[WeightRef, ...]

    def keeping(self, keeps: Callable[[str], bool]) -> BlockGraph:
        """The graph with some modules moved from `readers` to `float_readers`.

        Args:
            keeps: whether a module, by its name within the block, stays in float.
        """

        def without(site: Site) -> Site:
            kept = tuple(reader for reader in site.readers if keeps(reader.module))
            readers = tuple(reader for reader in site.readers if reader not in kept)
            return replace(site, readers=readers, float_readers=site.float_readers + kept)

        return replace(self, sites=tuple(without(site) for site in self.sites))

    @property
    def value_output(self) -> Site | None:
        """The input of attention's output projection, if value rows can absorb its divisor."""
        return next((site for site in self.sites if site.edge == "value_output"), None)

    @property
    def turned_values(self) -> Site | None:
        """`value_output`, if its values can be rotated per head."""
        site = self.value_output
        return site if site is not None and site.turns_values else None


def takes_rotation(graphs: Iterable[BlockGraph]) -> bool:
    """Whether a rotation of the residual stream can be folded into all blocks of a model."""
    return all(graph.residual_writers for graph in graphs)


def norm_offset(graphs: Iterable[BlockGraph]) -> float:
    """The offset of a model's norms (see `Norm`): that of the first norm in its blocks."""
    sites = (site for graph in graphs for site in graph.sites)
    return next((s.producer.offset for s in sites if isinstance(s.producer, Norm)), 0.0)


@dataclass(frozen=True)
class Parts:
    """The full names of the modules of one model that surround its blocks.

    Attributes:
        decoder: the model without its head, whose forward takes embeddings through the blocks;
            empty where that is the whole model.
        layers: the `nn.ModuleList` of blocks.
        embedding: the token embedding.
        final_norm: the norm behind the last block, or None.
        head: the linear that computes logits; None for a model that predicts no tokens.
        positions: the learned position embedding, or None.
        entry_norm: a norm between embedding and blocks, or None.
    """

    decoder: str
    layers: str
    embedding: str
    final_norm: str | None
    head: str | None
    positions: str | None
    entry_norm: str | None

    def block_name(self, index: int) -> str:
        """The full name of a block, such as `model.layers.0`."""
        return f"{self.layers}.{index}"

    @property
    def ends(self) -> tuple[str, ...]:
        """The full names of the embedding and, where the model has one, of the head."""
        return (self.embedding, *([] if self.head is None else [self.head]))

    @property
    def entering(self) -> tuple[str, ...]:
        """The full names of the embeddings whose rows sum to the first block's input."""
        return (self.embedding, *([] if self.positions is None else [self.positions]))

    @property
    def behind_blocks(self) -> str:
        """The full name of what reads the last block's output: the final norm, or the head.

        Raises:
            UnsupportedModelError: the model has neither.
        """
        if self.final_norm is None and self.head is None:
            raise UnsupportedModelError("nothing behind the blocks reads their output")
        return self.final_norm or str(self.head)

    def folds_head(self, model: PreTrainedModel) -> bool:
        """Whether the inverse of a residual rotation can be folded into an untied head.

        False where the final norm has a bias, or no weight to take its place.
        """
        if self.final_norm is None:
            return False
        norm = model.get_submodule(self.final_norm)
        return getattr(norm, "weight", None) is not None and getattr(norm, "bias", None) is None


def _refuses_none(config: PretrainedConfig) -> None:
    """None: every config of the family can be quantized."""


@dataclass(frozen=True)
class Family:
    """Models that share a wiring.

    Attributes:
        model_types: the config's `model_type` values.
        block: config and layer index → BlockGraph.
        layers, final_norm, positions, entry_norm: names within the decoder, as in `Parts`.
        centred: whether its norms subtract the mean (LayerNorm).
        flattens: whether a block joins batch and tokens in one dimension before some linears.
        sums_at_entry: whether the first block's input is a sum of multiples of the rows of
            `Parts.entering`, so that rotating those embeddings rotates it.
        notes: remarks for the user, such as which transforms its wiring does not allow.
        refuses: config → why this wiring is not that of such a model, or None.
    """

    model_types: tuple[str, ...]
    block: Callable[[PretrainedConfig, int], BlockGraph]
    layers: str = "layers"
    final_norm: str | None = "norm"
    positions: str | None = None
    entry_norm: str | None = None
    centred: bool = False
    flattens: bool = False
    sums_at_entry: bool = True
    notes: tuple[str, ...] = ()
    refuses: Callable[[PretrainedConfig], str | None] = _refuses_none

    def graph(self, config: PretrainedConfig, index: int, block: nn.Module) -> BlockGraph:
        """The wiring of one block of a model.

        Args:
            config: of the decoder. Head counts are those of the block's tensors instead, for a
                config may have fields that its model does not use.
            index: of the block.
            block: linearized, on any device.

        Raises:
            UnsupportedModelError: the block's tensors do not fit the wiring.
        """
        graph = self.block(config, index)
        heads = _heads_of_tensors(graph, config, block)
        if heads is not None:
            graph = self.block(_with_heads(config, heads), index)
        _check_fits(graph, config, index, block)
        return graph

    def parts(self, model: PreTrainedModel) -> Parts:
        """The full names of a model's parts."""
        names = {id(module): name for name, module in model.named_modules()}
        decoder = names[id(decoder_of(model))]
        head = model.get_output_embeddings()

        def within(name: str) -> str:
            return f"{decoder}.{name}" if decoder else name

        return Parts(
            decoder=decoder,
            layers=within(self.layers),
            embedding=names[id(model.get_input_embeddings())],
            final_norm=None if self.final_norm is None else within(self.final_norm),
            head=None if head is None else names[id(head)],
            positions=None if self.positions is None else within(self.positions),
            entry_norm=None if self.entry_norm is None else within(self.entry_norm),
        )

    def folds_offline(self, model: PreTrainedModel) -> bool:
        """Whether a residual rotation can be folded into a model's embeddings and untied head.

        Features of images and sound, which towers make, take the place of rows of the embedding.
        """
        parts = self.parts(model)
        folds = self.sums_at_entry and parts.head is not None and parts.folds_head(model)
        return folds and not _has_towers(model, parts)


def _has_towers(model: PreTrainedModel, parts: Parts) -> bool:
    """Whether a model has matrices outside of its decoder and head."""
    text = tuple(
        f"{name}." if name else "" for name in (parts.decoder, parts.head or parts.decoder)
    )
    return any(p.dim() > 1 and not name.startswith(text) for name, p in model.named_parameters())


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """The decoder of a model, without a head: it takes embeddings through the blocks.

    A wrapper's may itself be a model with a head; and a model may call its head `decoder`, so that
    what has no list of blocks is none.
    """
    decoder: nn.Module = model.get_decoder()
    if not any(isinstance(module, nn.ModuleList) for module in decoder.modules()):
        return model.base_model
    inner = decoder.get_decoder() if isinstance(decoder, PreTrainedModel) else decoder
    return decoder if inner is decoder else decoder_of(cast(PreTrainedModel, decoder))


def text_config(model: PreTrainedModel) -> PretrainedConfig:
    """The config of the model's decoder."""
    return model.config.get_text_config(decoder=True)


def final_output(model: PreTrainedModel, tokens: Tensor, **options: Any) -> Tensor:
    """A model's logits; its decoder's last hidden states where it predicts no tokens.

    Args:
        model: any class of model around a decoder.
        tokens: int64 (sequences, length).
        options: more arguments of its forward. Where they have images or sound, in tensors, the
            whole of the model runs.

    Returns:
        float (sequences, length, vocabulary or hidden size).
    """
    head = model.get_output_embeddings()
    if any(isinstance(option, Tensor) for option in options.values()):
        predictor: nn.Module = model  # features of images or audio are for its towers
    else:
        predictor = decoder_of(model) if head is None else _predictor(model, head)
    output: Any = predictor(input_ids=tokens, **options)
    final: Tensor = output[0] if head is None else output.logits
    return final


def _predictor(model: PreTrainedModel, head: nn.Module) -> PreTrainedModel:
    """The innermost model with this head: text runs also where the class around it asks more."""
    models = (module for module in model.modules() if isinstance(module, PreTrainedModel))
    *_, innermost = (m for m in models if m is model or m.get_output_embeddings() is head)
    return innermost


def is_tied(model: PreTrainedModel) -> bool:
    """Whether a model ties its head to the embedding, by its own ties rather than its config."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None:
        return False
    names = {id(module): name for name, module in model.named_modules()}
    tied = tied_weights(model)
    return tied.get(f"{names[id(head)]}.weight") == f"{names[id(embedding)]}.weight"


def attention_heads(config: PretrainedConfig) -> Heads:
    """The heads that a decoder's config names; `head_dim` need not be hidden_size / heads.

    The model's own may differ: `Family.graph` goes by its tensors.
    """
    query = config.num_attention_heads

    def named(field: str, otherwise: int) -> int:
        try:
            value = getattr(config, field, None)
        except Exception:  # a config with values by layer may refuse to name one
            return otherwise
        return value if isinstance(value, int) and value > 0 else otherwise

    dim = named("head_dim", config.hidden_size // query)
    return Heads(query, named("num_key_value_heads", query), dim)


def _heads_of_tensors(
    graph: BlockGraph, config: PretrainedConfig, block: nn.Module
) -> Heads | None:
    """The heads by the shapes of value and output projections; None if these are ambiguous."""
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
    """A copy of a config with these head counts; the config itself where it has them."""
    if attention_heads(config) == heads:
        return config
    corrected: Any = copy.copy(config)
    if attention_heads(config).dim != heads.dim:
        corrected.head_dim = heads.dim
    corrected.num_key_value_heads = heads.key_value
    return cast(PretrainedConfig, corrected)


def _check_fits(graph: BlockGraph, config: PretrainedConfig, index: int, block: nn.Module) -> None:
    """Raise UnsupportedModelError where a block's tensors do not fit its graph."""
    for site in graph.sites:
        what = _misfit(site, block)
        if what is not None:
            raise UnsupportedModelError(
                f"{config.model_type}: block {index} is not what its config says: {what}; "
                "correct config.json, or take out the field that its model does not use"
            )


def _misfit(site: Site, block: nn.Module) -> str | None:
    """How a site contradicts a block's tensors, or None."""
    try:
        widths = {reader.view(block).shape[1] for reader in site.all_readers}
        channels = _channels(site, block)
    except AttributeError as error:
        return f"{site.name}: {error}"
    if len(widths) != 1:
        return f"what reads {site.name} has {sorted(widths)} input channels"
    (width,) = widths
    if channels is not None and channels != width:
        return f"{site.name} has {width} input channels, and {channels} are made for it"
    routed = [reader.module for reader in site.readers if reader.routed]
    stacks = {module.rpartition(".")[0] for module in routed if module[-1].isdigit()}
    expert_count = sum(len(list(block.get_submodule(stack).children())) for stack in stacks)
    if site.reads == "residual" and expert_count > len(routed):
        return f"{expert_count} experts where {len(routed)} are expected"
    return None


def _channels(site: Site, block: nn.Module) -> int | None:
    """How many of a site's input channels its producer computes; None without a producer."""
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
