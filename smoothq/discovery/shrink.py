"""Configs of tiny models: the same wiring as a real config's, with small widths and few layers.

What a field means is known by its name. A config whose fields bind each other in a way that the
names do not tell fits no model at small widths; so several attempts are offered, each of which
changes less than the one before.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from transformers import PretrainedConfig

from ..compat import drop_layer_values

HIDDEN, HEADS, HEAD_DIM, VOCABULARY, EXPERTS = 64, 4, 16, 64, 4

# All different: a config may hold a width that its model does not use.
WIDTHS = {
    "intermediate_size": 80,
    "ffn_dim": 112,
    "ffn_hidden_size": 160,
    "dff": 176,
    "n_inner": 144,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 96,
}
EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_EXPERTS_OF_TOKEN = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "num_experts_per_topk",
    "moe_topk",
    "moe_k",
    "moe_top_k",
    "top_k",
    "top_k_experts",
)
_COUNTED_HEADS = ("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads")
_VOCABULARIES = ("vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size")

# Fields of attention, state-space layers, and experts that some models have beside Llama's.
_OTHER_WIDTHS = {
    "word_embed_proj_dim": HIDDEN,
    "embedding_size": HIDDEN,
    "rotary_dim": HEAD_DIM,
    "head_dim": HEAD_DIM,
    "swa_head_dim": HEAD_DIM,
    "global_head_dim": 2 * HEAD_DIM,
    "swa_num_attention_heads": HEADS,
    "q_lora_rank": 24,
    "kv_lora_rank": 40,
    "o_lora_rank": 32,
    "qk_rope_head_dim": HEAD_DIM,
    "qk_nope_head_dim": HEAD_DIM,
    "qk_head_dim": 2 * HEAD_DIM,  # of both, where it is stored
    "v_head_dim": HEAD_DIM,
    "index_head_dim": HEAD_DIM,
    "index_n_heads": 2,
    "o_groups": 2,
    "n_group": 1,
    "topk_group": 1,
    "num_expert_groups": 1,
    "intermediate_size_mlp": 104,
    "dense_intermediate_size": 120,
    "expert_ffn_hidden_size": 72,
    "shared_intermediate_size": 88,
    "shared_experts_intermediate_size": 96,
    "moe_shared_expert_intermediate_size": 136,
    "hidden_size_per_layer_input": 16,
    "laurel_rank": 8,
    "mamba_d_state": 16,
    "mamba_n_heads": 8,
    "mamba_num_heads": 8,
    "mamba_d_head": 16,
    "mamba_head_dim": 16,
    "mamba_d_ssm": 128,
    "mamba_n_groups": 1,
    "mamba_dt_rank": 8,
    "mamba_chunk_size": 16,
    "chunk_size": 16,
    "state_size": 16,
    "ssm_state_size": 16,
    "n_groups": 1,
    "time_step_rank": 8,
    "lru_width": HIDDEN,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_head_dim": 16,
    "linear_num_heads": 4,
}


# Fields of vision and audio towers, and of what stands between them and the decoder.
_TOWER = {
    **dict.fromkeys(("hidden_size", "embed_dim", "d_model", "projection_dim"), 32),
    **dict.fromkeys(("intermediate_size", "mlp_dim", "ffn_dim", "encoder_ffn_dim"), 64),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "encoder_layers", "depth"), 2),
    **dict.fromkeys(("num_attention_heads", "num_heads", "encoder_attention_heads"), 2),
    **dict.fromkeys(("num_key_value_heads", "attention_heads", "layers", "n_layers"), 2),
    **dict.fromkeys(("decoder_layers", "decoder_attention_heads", "num_blocks"), 2),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_hidden_size"), 32),
    "head_dim": 16,
    "image_size": 32,
    "patch_size": 8,
    "num_mel_bins": 16,
    "max_source_positions": 64,
}
_TOWER_OUTPUTS = ("out_hidden_size", "text_hidden_size", "output_dim", "adapter_out_dim")


def tiny_configs(
    config: PretrainedConfig, layers: int, towers: bool = False
) -> Iterator[PretrainedConfig]:
    """Copies of a config with `layers` layers, the smallest widths first.

    Args:
        config: of the real model.
        layers: blocks of the tiny model's decoder.
        towers: whether to make vision and audio towers small too; else they are the real ones.
    """
    for shrink in (_to_small_widths, _to_small_counts, _to_few_layers):
        tiny = copy.deepcopy(config)
        if hasattr(tiny, "quantization_config"):
            del tiny.quantization_config
        shrink(tiny.get_text_config(decoder=True), layers)
        if towers:
            _to_small_towers(tiny, tiny.get_text_config(decoder=True))
        yield tiny


def _to_small_widths(decoder: PretrainedConfig, layers: int) -> None:
    """Small widths everywhere."""
    real_heads, real_dim = number_of(decoder, "num_attention_heads"), _rotary_dim(decoder)
    _to_small_counts(decoder, layers)
    _set(decoder, {"hidden_size": HIDDEN, "num_attention_heads": HEADS, **_OTHER_WIDTHS, **WIDTHS})
    shared = {real_heads: HEADS, 1: 1}
    for counted in _COUNTED_HEADS:
        count = number_of(decoder, counted)
        if count is not None:
            _set(decoder, {counted: shared.get(count, HEADS // 2)})
    _fit_state_heads(decoder)
    _fit_sections(decoder, real_dim)


def _to_small_counts(decoder: PretrainedConfig, layers: int) -> None:
    """Few layers, experts and tokens of the vocabulary."""
    _to_few_layers(decoder, layers)
    _set(decoder, dict.fromkeys(EXPERT_COUNTS, EXPERTS))
    routed = any(number_of(decoder, name) for name in EXPERT_COUNTS)
    for chosen in _EXPERTS_OF_TOKEN:
        count = number_of(decoder, chosen)
        if count is not None:
            _set(decoder, {chosen: min(count, 2)})
        elif routed and vars(decoder).get(chosen, 0) is None:  # the class has no default
            setattr(decoder, chosen, 2)


def _to_few_layers(decoder: PretrainedConfig, layers: int) -> None:
    """Few layers, and a small vocabulary; lists with an entry for each layer are cut."""
    count = number_of(decoder, "num_hidden_layers")
    if count is not None and layers < count:
        _set(decoder, {"num_hidden_layers": layers, "num_layers": layers})
        for name, value in list(vars(decoder).items()):
            if isinstance(value, list | tuple) and len(value) == count and count > 1:
                _set(decoder, {name: value[:layers]})
            elif isinstance(value, list) and name.endswith(("layers", "layer_ids", "indices")):
                _set(decoder, {name: [index for index in value if _is_below(index, layers)]})
        drop_layer_values(decoder, layers)
    _set(decoder, dict.fromkeys(_VOCABULARIES, VOCABULARY))
    if (number_of(decoder, "pad_token_id") or 0) >= VOCABULARY:
        decoder.pad_token_id = 0


def _to_small_towers(config: PretrainedConfig, decoder: PretrainedConfig) -> None:
    """Small widths in all configs within a config but the decoder's."""
    for name in () if config is decoder else config.sub_configs:
        tower = getattr(config, name, None)
        if tower is decoder or not isinstance(tower, PretrainedConfig):
            continue
        _set(tower, {field: size for field, size in _TOWER.items() if number_of(tower, field)})
        _set(tower, dict.fromkeys(_TOWER_OUTPUTS, decoder.hidden_size))
        for field, value in list(vars(tower).items()):
            if isinstance(value, list) and field.endswith(("indexes", "indices")):
                _set(tower, {field: [index for index in value if _is_below(index, 2)] or [1]})
        _to_small_towers(tower, decoder)


def _is_below(index: Any, layers: int) -> bool:
    return not isinstance(index, int) or index < layers


def number_of(config: PretrainedConfig, name: str) -> int | None:
    """A field that is a positive number; None for anything else."""
    try:
        value = getattr(config, name, None)
    except Exception:  # a property of a config with values by layer may refuse to name one
        value = vars(config).get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _set(config: PretrainedConfig, changes: dict[str, Any]) -> None:
    """Set the fields that a config has as numbers or lists; a property is what it computes."""
    for name, value in changes.items():
        mapped = config.attribute_map.get(name, name)
        if isinstance(getattr(type(config), mapped, None), property):
            continue
        present = vars(config).get(mapped)
        if isinstance(present, list | tuple) and isinstance(value, int):
            value = [value] * len(present)
        if present is not None and not isinstance(present, bool):
            setattr(config, mapped, value)


def _rotary_dim(decoder: PretrainedConfig) -> int:
    """Channels of a head that the position embedding turns, if all are."""
    heads = number_of(decoder, "num_attention_heads") or 1
    named = number_of(decoder, "qk_rope_head_dim") or number_of(decoder, "head_dim")
    return named or (number_of(decoder, "hidden_size") or heads) // heads


def _fit_state_heads(decoder: PretrainedConfig) -> None:
    """Let the heads of a state-space layer fill its inner width, as Mamba-2 asks."""
    expand, dim = number_of(decoder, "expand"), number_of(decoder, "head_dim")
    if expand is not None and dim is not None:
        _set(decoder, {"num_heads": expand * HIDDEN // dim})


def _fit_sections(decoder: PretrainedConfig, real_dim: int) -> None:
    """Divide the channels of a small head among time, height and width as those of a real one."""
    rope = getattr(decoder, "rope_parameters", None)
    if not isinstance(rope, dict):
        return
    sections, small_dim = rope.get("mrope_section"), _rotary_dim(decoder)
    if isinstance(sections, list | tuple):
        total = sum(sections) * small_dim // max(real_dim, 1)
    elif "mrope_section" in getattr(type(decoder), "ignore_keys_at_rope_validation", ()):
        # Those that the model's code has for a config without (Qwen2.5-VL): in these proportions.
        sections = (2, 3, 3)
        total = int(small_dim * rope.get("partial_rotary_factor", 1.0)) // 2
    else:
        return
    fitted = [max(1, size * total // sum(sections)) for size in sections]
    fitted[-1] += total - sum(fitted)
    decoder.rope_parameters = {**rope, "mrope_section": fitted}
