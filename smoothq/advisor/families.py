"""Support matrix: the methods that each model type can take, read from its block graphs."""

from __future__ import annotations

from transformers import AutoConfig, PretrainedConfig

from ..architectures import BlockGraph, family_of, supported_model_types
from ..architectures.attention_support import unquantizable_attention
from ..checkpoint.model_class import class_of
from .model_claims import EDGES, NONE, edges_cell, stream_cell

HEADER = (
    "model type",
    "SmoothQuant",
    "QuaRot",
    "SmoothRot",
    "RS, RRS",
    "KV cache",
    "experts",
)


def rows() -> list[tuple[str, ...]]:
    """The support matrix: one row a model type, one cell for each column of `HEADER`.

    Each model type is represented by its default config. The cells:

    - SmoothQuant, SmoothRot: the edges at which smoothing divisors can be folded into weights.
    - QuaRot: how the residual stream can be rotated, as `stream_cell` says it.
    - RS, RRS: the scopes of runtime smoothing that the family can take.
    - KV cache: whether a quantized KV cache with int8 attention can replace the family's attention.
    - experts: how many layers have them.
    """
    return [_row(model_type) for model_type in supported_model_types()]


def _row(model_type: str) -> tuple[str, ...]:
    config = AutoConfig.for_model(model_type)
    family = family_of(config)
    assert family is not None
    graphs = [family.block(config, index) for index in range(config.num_hidden_layers)]
    edges = edges_cell(graphs)
    experts = any(site.routed for graph in graphs for site in graph.sites)
    return (
        model_type,
        edges,
        stream_cell(family, graphs),
        EDGES["up_down"] if EDGES["up_down"] in edges else NONE,
        "token, calibrated" if family.flattens else "token, calibrated, live",
        _attention(config),
        _experts(graphs) if experts else NONE,
    )


def _attention(config: PretrainedConfig) -> str:
    reason = unquantizable_attention(config, class_of(config))
    return "yes" if reason is None else "no"


def _experts(graphs: list[BlockGraph]) -> str:
    layers = sum(any(site.routed for site in graph.sites) for graph in graphs)
    return "each layer" if layers == len(graphs) else f"{layers} of {len(graphs)} layers"
