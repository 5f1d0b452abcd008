"""What is known of a model's wiring: the claims that hold for it, and what stays in float."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from rich.table import Table
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from ..architectures import BlockGraph, Family, Heads, Norm, Site, WeightRef
from ..architectures.experts import closed_stacks
from ..architectures.graph import takes_rotation
from ..architectures.linearize import SeparateExperts
from ..architectures.sensitive import float_by_default
from ..checkpoint.skeleton import skeleton_of
from ..discovery.family_source import InferredFamily
from ..discovery.infer import discover_family
from ..plan.attention import float_attention
from ..plan.wiring import Wiring
from ..report.table import columns, pairs

NONE = "none"
EDGES = {"norms": "norms", "up_down": "up→down", "value_output": "v→o"}
FOUND = "found by experiments on a tiny model"


@dataclass(frozen=True)
class SiteClaims:
    """One site of a block; the sites of a layer's experts are one.

    Attributes:
        name: of the site.
        linears: the names within the block of those that share its input; `*` for all experts.
        edge: the kind of the edge at which a divisor can be folded away, or None.
        producer: the names of the norm or weights that take the divisor.
        turns_values: whether the values behind its input can be rotated per head.
    """

    name: str
    linears: tuple[str, ...]
    edge: str | None
    producer: tuple[str, ...]
    turns_values: bool


@dataclass(frozen=True)
class BlockClaims:
    """Blocks of which the same is claimed.

    Attributes:
        indices: their numbers.
        sites: in the order of execution.
    """

    indices: tuple[int, ...]
    sites: tuple[SiteClaims, ...]


@dataclass(frozen=True)
class ModelClaims:
    """The claims that hold for a model.

    Attributes:
        model: as the user named it.
        model_type: of its decoder.
        model_class: the name of its class.
        source: where its wiring comes from: a module of smoothq, or `FOUND`.
        blocks: by what is claimed of them.
        stream: how its residual stream can be rotated, as `stream_cell` says it.
        heads: of its layers of attention, as far as its values reach the output projection.
        float_attention: why its KV cache and attention cannot be quantized, or None.
        live: whether runtime smoothing can share scales over a sequence.
        experts: how its experts are stored, by the name of their module within a block.
        floats: pattern of what stays in float → why.
        notes: on claims that failed, and other remarks of the family.
    """

    model: str
    model_type: str
    model_class: str
    source: str
    blocks: tuple[BlockClaims, ...]
    stream: str
    heads: tuple[Heads, ...]
    float_attention: str | None
    live: bool
    experts: dict[str, str]
    floats: dict[str, str]
    notes: tuple[str, ...]


def edges_cell(graphs: Iterable[BlockGraph]) -> str:
    """The edges at which divisors can be folded into weights."""
    edges = {site.edge for graph in graphs for site in graph.sites}
    return ", ".join(text for edge, text in EDGES.items() if edge in edges) or NONE


def stream_cell(family: Family, graphs: Iterable[BlockGraph]) -> str:
    """How the residual stream can be rotated.

    `offline` if the rotation is folded into weights, with `mean kept` if it is one that LayerNorms
    commute with; `online, by site` if the inputs of linears are rotated at run time instead.
    """
    if not takes_rotation(graphs):
        return "online, by site"
    return "offline, mean kept" if family.centred else "offline"


def claims_of(config: PretrainedConfig, name: str) -> ModelClaims:
    """The claims that hold for a model; no weight is read.

    Args:
        config: of the model.
        name: of the model, for the result and for messages.

    Raises:
        UnsupportedModelError: the model cannot be quantized.
    """
    return claims_of_model(skeleton_of(config, name), name)


def claims_of_model(skeleton: PreTrainedModel, name: str) -> ModelClaims:
    """As `claims_of`, of a model on the meta device."""
    wiring = Wiring.of(skeleton)
    indices_of: dict[tuple[SiteClaims, ...], list[int]] = {}
    known: dict[int, tuple[SiteClaims, ...]] = {}  # equal graphs are mostly one object
    for index, graph in enumerate(wiring.graphs):
        if id(graph) not in known:
            known[id(graph)] = tuple(_site_claims(graph))
        indices_of.setdefault(known[id(graph)], []).append(index)
    outputs = (graph.value_output for graph in wiring.graphs)
    heads = dict.fromkeys(site.heads for site in outputs if site is not None and site.heads)
    family = wiring.family
    return ModelClaims(
        model=name,
        model_type=wiring.config.model_type,
        model_class=wiring.model_class.__name__,
        source=FOUND if isinstance(family, InferredFamily) else family.block.__module__,
        blocks=tuple(BlockClaims(tuple(indices), sites) for sites, indices in indices_of.items()),
        stream=stream_cell(family, wiring.graphs),
        heads=tuple(heads),
        float_attention=float_attention(wiring),
        live=not family.flattens,
        experts=_experts(wiring),
        floats=_floats(wiring),
        notes=family.notes,
    )


def source_of(config: PretrainedConfig) -> str:
    """The wiring that experiments find for a model, as the source of a family's file."""
    return discover_family(config)[1]


def tables(claims: ModelClaims) -> list[Table]:
    """The claims as tables: on the model, on the sites of its blocks, on what stays in float."""
    count = sum(len(block.indices) for block in claims.blocks)
    turning = sum(
        len(block.indices) for block in claims.blocks if any(s.turns_values for s in block.sites)
    )
    scopes = "token, calibrated, live" if claims.live else "token, calibrated"
    rows = [
        ("class", f"{claims.model_class}, {claims.model_type}"),
        ("wiring", claims.source),
        ("rotation of the residual stream", claims.stream),
        ("rotation of values", f"{turning} of {count} blocks" if turning else NONE),
        ("KV cache and attention", _attention_cell(claims)),
        ("runtime smoothing", scopes),
        *((f"experts: {name}", form) for name, form in claims.experts.items()),
        *(("note", note) for note in claims.notes),
    ]
    wirings = [
        columns(
            f"blocks {_ranges(block.indices)}",
            ("site", "linears that share its input", "its divisor passes to"),
            [
                (
                    site.name,
                    ", ".join(site.linears) or "none is quantized",
                    f"{EDGES[site.edge]}: {', '.join(site.producer)}" if site.edge else NONE,
                )
                for site in block.sites
            ],
        )
        for block in claims.blocks
    ]
    floats = columns("stays in float", ("what", "why"), list(claims.floats.items()))
    return [pairs(claims.model, rows), *wirings, *([floats] if claims.floats else [])]


def _attention_cell(claims: ModelClaims) -> str:
    if claims.float_attention is not None:
        return f"stay in float: {claims.float_attention}"
    return "; ".join(
        f"{heads.query} heads over {heads.key_value} for keys and values, of {heads.dim}"
        for heads in claims.heads
    )


def _site_claims(graph: BlockGraph) -> Iterator[SiteClaims]:
    """Yield a block's sites: those of the same stage in a layer's experts as one."""
    seen = set()
    for site in graph.sites:
        claims = _claims_at(site)
        if claims not in seen:
            seen.add(claims)
            yield claims


def _claims_at(site: Site) -> SiteClaims:
    producer = site.producer
    names = [producer.weight.removesuffix(".weight")] if isinstance(producer, Norm) else []
    if producer is not None and not isinstance(producer, Norm):
        names = _names(producer.refs, site.routed)
    return SiteClaims(
        name=site.stage,
        linears=tuple(_names(site.readers)),
        edge=site.edge,
        producer=tuple(names),
        turns_values=site.turns_values,
    )


def _names(refs: Iterable[WeightRef], routed: bool = False) -> list[str]:
    """The names of some weights' modules, each once; those of all experts are one."""
    names = (_starred(ref.module) if routed or ref.routed else ref.module for ref in refs)
    return list(dict.fromkeys(names))


def _starred(name: str) -> str:
    """A name with `*` for its numbers."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def _distinct(wiring: Wiring) -> Iterator[tuple[nn.Module, BlockGraph]]:
    """Yield the blocks that differ, with their graphs."""
    seen = set()
    for layer, graph in zip(wiring.layers, wiring.graphs, strict=True):
        if (id(layer), id(graph)) not in seen:
            seen.add((id(layer), id(graph)))
            yield layer, graph


def _experts(wiring: Wiring) -> dict[str, str]:
    """How experts are stored: name of their module within a block → text."""
    forms = {}
    for layer, _ in _distinct(wiring):
        for name, module in layer.named_modules():
            if isinstance(module, SeparateExperts):
                form = module.form
                turned = f", transposed: {', '.join(form.transposed)}" if form.transposed else ""
                kind = form.mixin.__name__
                forms[name] = f"{len(module.first[0])}, {kind} of {', '.join(form.stacks)}{turned}"
    return forms


def _floats(wiring: Wiring) -> dict[str, str]:
    """Patterns of the matrices that stay in float → why."""
    floats: dict[str, str] = {}
    names = list(wiring.linears)
    for layer, graph in _distinct(wiring):
        quantized = {reader.tensor for site in graph.sites for reader in site.readers}
        beside = {ref.tensor: site.stage for site in graph.sites for ref in site.float_readers}
        closed = set(closed_stacks(layer))
        for name, parameter in layer.named_parameters():
            if parameter.dim() < 2 or name in quantized:
                continue
            owner = layer.get_submodule(name.rpartition(".")[0])
            pattern = f"*.{_starred(name.removesuffix('.weight'))}"
            if name in beside:
                names.append(pattern)
                floats[pattern] = f"beside what reads the input of {beside[name]}, as a router is"
            elif name in closed:
                floats[pattern] = "a stack of matrices of no form that is known"
            elif isinstance(owner, nn.modules.conv._ConvNd):
                floats[pattern] = "a convolution"
            else:
                floats[pattern] = f"of a module that is no plain linear: {type(owner).__name__}"
    floats |= float_by_default(names)
    prefix = f"{wiring.parts.layers}."
    for name in wiring.read:
        inside = name.removeprefix(prefix).partition(".")[2] if name.startswith(prefix) else ""
        pattern = f"*.{_starred(inside)}" if inside else name
        floats[pattern] = "the model's own code reads its weight"
    outside = [name for name in wiring.float_matrices if name not in wiring.parts.ends]
    if outside:
        floats["outside of the text model"] = f"{len(outside)} matrices, such as {outside[0]}"
    return floats


def _ranges(indices: tuple[int, ...]) -> str:
    """Numbers in ascending order, in words: `0 to 2, 4`."""
    spans: list[list[int]] = []
    for index in indices:
        if spans and index == spans[-1][1] + 1:
            spans[-1][1] = index
        else:
            spans.append([index, index])
    return ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in spans)
