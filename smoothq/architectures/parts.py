"""Sites that many families share, under the names of Llama's modules."""

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


def weights(*modules: str, multiple: int = 0) -> tuple[WeightRef, ...]:
    """References to the whole weights of modules, by their names within the block.

    Args:
        modules: their names.
        multiple: as `WeightRef.multiple`.
    """
    return tuple(WeightRef(f"{module}.weight", multiple=multiple) for module in modules)


def separate_attention(
    config: PretrainedConfig, norm: Norm | None, output: str = "o_proj"
) -> tuple[Site, Site]:
    """The sites `qkv` and `o` of a `self_attn` with separate q, k and v linears.

    Args:
        config: of the decoder.
        norm: before q, k and v; None where they read the residual stream itself.
        output: the name of the output projection.
    """
    q, k, v, o = weights(*(f"self_attn.{part}" for part in ("q_proj", "k_proj", "v_proj", output)))
    heads = attention_heads(config)
    return (
        Site("qkv", "residual", (q, k, v), norm),
        Site("o", "attention", (o,), Rows((v,), heads)),
    )


def fused_attention(
    qkv: WeightRef, output: WeightRef, values: tuple[WeightRef, ...], heads: Heads, norm: Norm
) -> tuple[Site, Site]:
    """The sites `qkv` and `o` of an attention with q, k and v in one linear.

    Args:
        qkv: the weight of that linear.
        output: the weight of the output projection.
        values: the rows of `qkv` that compute values.
        heads: of the layer.
        norm: before `qkv`.
    """
    return (
        Site("qkv", "residual", (qkv,), norm),
        Site("o", "attention", (output,), Rows(values, heads)),
    )


def gated_mlp(norm: Norm | None) -> tuple[Site, Site]:
    """The sites `gate_up` and `down` of an `mlp` with separate gate and up linears."""
    gate, up, down = weights("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    return (
        Site("gate_up", "residual", (gate, up), norm),
        Site("down", "mlp", (down,), Rows((up,))),
    )


def fused_gated_mlp(config: PretrainedConfig, norm: Norm | None) -> tuple[Site, Site]:
    """The sites `gate_up` and `down` of an `mlp` with one linear: rows of gate, then of up."""
    gate_up, down = weights("mlp.gate_up_proj", "mlp.down_proj")
    width = config.intermediate_size
    up = WeightRef(gate_up.tensor, rows=slice(width, None))
    return (
        Site("gate_up", "residual", (gate_up,), norm),
        Site("down", "mlp", (down,), Rows((up,))),
    )


def plain_mlp(up: WeightRef, down: WeightRef, norm: Norm, activation: str) -> tuple[Site, Site]:
    """The sites `up` and `down` of an MLP without a gate.

    Args:
        up: the weight before the activation.
        down: the weight behind it.
        norm: before `up`.
        activation: its name in the config; only for `HOMOGENEOUS_ACTIVATIONS` can rows of `up`
            absorb a divisor of `down`'s input.
    """
    passes = activation in HOMOGENEOUS_ACTIVATIONS
    return (
        Site("up", "residual", (up,), norm),
        Site("down", "mlp", (down,), Rows((up,)) if passes else None),
    )


def experts(
    module: str,
    count: int,
    up: slice | None,
    first: tuple[str, ...] = ("gate_up_proj",),
    second: str | None = "down_proj",
    downs: int | None = None,
) -> tuple[tuple[WeightRef, ...], tuple[Site, ...]]:
    """The first weights of linearized experts, and a site `down.N` for each expert.

    Args:
        module: the name of the experts module.
        count: of experts.
        up: the rows of an expert's gate_up matrix that compute up, which can absorb a divisor of
            `down`'s input; None where nothing can. With several first matrices, of the last.
        first: names of the lists of linears that read the module's input (`Form.first`).
        second: name of the list that reads the activation, or None.
        downs: how many linears that has, if not as many as experts.
    """

    def routed(name: str, expert: int) -> WeightRef:
        return WeightRef(f"{module}.{name}.{expert}.weight", routed=True)

    readers = tuple(routed(name, expert) for name in first for expert in range(count))
    if second is None:
        return readers, ()
    sites = tuple(
        Site(
            f"down.{expert}",
            "mlp",
            (routed(second, expert),),
            None if up is None else Rows((WeightRef(routed(first[-1], expert).tensor, rows=up),)),
        )
        for expert in range(count if downs is None else downs)
    )
    return readers, sites


def writers(*sites: Site) -> tuple[WeightRef, ...]:
    """The readers of some sites, for `BlockGraph.residual_writers`."""
    return tuple(reader for site in sites for reader in site.readers)


def interleaved_values(tensor: str, heads: Heads) -> tuple[WeightRef, ...]:
    """The value rows of a fused qkv whose rows are grouped by key/value head: q, k, v of each."""
    group = (heads.query // heads.key_value + 2) * heads.dim
    starts = range(group - heads.dim, heads.key_value * group, group)
    return tuple(WeightRef(tensor, rows=slice(start, start + heads.dim)) for start in starts)


def concatenated_values(tensor: str, heads: Heads) -> WeightRef:
    """The value rows of a fused qkv with all of q first, then all of k, then all of v."""
    first = (heads.query + heads.key_value) * heads.dim
    return WeightRef(tensor, rows=slice(first, None))
