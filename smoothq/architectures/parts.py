"""Pieces that many families share, under Llama's names."""

from __future__ import annotations

from transformers import PretrainedConfig

from .graph import (
    HOMOGENEOUS_ACTIVATIONS,
    Heads,
    Norm,
    Rows,
    Site,
    WeightRef,
    attention_heads,
)


def weights(*modules: str) -> tuple[WeightRef, ...]:
    """The whole weights of modules."""
    return tuple(WeightRef(f"{module}.weight") for module in modules)


def separate_attention(
    config: PretrainedConfig, norm: Norm | None, output: str = "o_proj"
) -> tuple[Site, Site]:
    """The sites of `self_attn` with q, k and v apart: what they read, and the output's input."""
    q, k, v, o = weights(*(f"self_attn.{part}" for part in ("q_proj", "k_proj", "v_proj", output)))
    heads = attention_heads(config)
    return (
        Site("qkv", "stream", (q, k, v), norm),
        Site("o", "values", (o,), Rows((v,), heads)),
    )


def fused_attention(
    qkv: WeightRef, output: WeightRef, values: tuple[WeightRef, ...], heads: Heads, norm: Norm
) -> tuple[Site, Site]:
    """The sites of an attention with q, k and v in one linear. values: its rows that are v."""
    return (
        Site("qkv", "stream", (qkv,), norm),
        Site("o", "values", (output,), Rows(values, heads)),
    )


def gated_mlp(norm: Norm | None) -> tuple[Site, Site]:
    """The sites of `mlp` with gate and up apart."""
    gate, up, down = weights("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    return (
        Site("gate_up", "stream", (gate, up), norm),
        Site("down", "inner", (down,), Rows((up,))),
    )


def fused_gated_mlp(config: PretrainedConfig, norm: Norm | None) -> tuple[Site, Site]:
    """The sites of `mlp` with gate above up in one linear."""
    gate_up, down = weights("mlp.gate_up_proj", "mlp.down_proj")
    width = config.intermediate_size
    up = WeightRef(gate_up.tensor, rows=slice(width, None))
    return (
        Site("gate_up", "stream", (gate_up,), norm),
        Site("down", "inner", (down,), Rows((up,))),
    )


def plain_mlp(up: WeightRef, down: WeightRef, norm: Norm, activation: str) -> tuple[Site, Site]:
    """The sites of an MLP without a gate: a divisor passes only some activations."""
    passes = activation in HOMOGENEOUS_ACTIVATIONS
    return (
        Site("up", "stream", (up,), norm),
        Site("down", "inner", (down,), Rows((up,)) if passes else None),
    )


def experts(
    module: str, count: int, up: slice | None
) -> tuple[tuple[WeightRef, ...], tuple[Site, ...]]:
    """What of opened experts reads the stream, and the sites inside of them.

    up: which rows of an expert's fused matrix its gated product is linear in, or None.
    """
    names = [f"{module}.gate_up_proj.{expert}.weight" for expert in range(count)]
    readers = tuple(WeightRef(name, routed=True) for name in names)
    sites = tuple(
        Site(
            f"down.{expert}",
            "inner",
            (WeightRef(f"{module}.down_proj.{expert}.weight", routed=True),),
            None if up is None else Rows((WeightRef(name, rows=up),)),
        )
        for expert, name in enumerate(names)
    )
    return readers, sites


def writers(*sites: Site) -> tuple[WeightRef, ...]:
    """The readers of sites whose outputs are added to the stream."""
    return tuple(reader for site in sites for reader in site.readers)


def interleaved_values(tensor: str, heads: Heads) -> tuple[WeightRef, ...]:
    """The value rows of a fused qkv by key/value head: its queries, its key, its value."""
    group = (heads.query // heads.key_value + 2) * heads.dim
    starts = range(group - heads.dim, heads.key_value * group, group)
    return tuple(WeightRef(tensor, rows=slice(start, start + heads.dim)) for start in starts)


def concatenated_values(tensor: str, heads: Heads) -> WeightRef:
    """The value rows of a fused qkv: all of q, then all of k, then all of v."""
    first = (heads.query + heads.key_value) * heads.dim
    return WeightRef(tensor, rows=slice(first, None))
