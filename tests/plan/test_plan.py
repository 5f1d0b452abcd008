"""What a recipe comes to for a model: bits counted, groups chosen, contradictions refused."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from smoothq import Recipe, load_recipe, preset
from smoothq.checkpoint.skeleton import skeleton_of
from smoothq.errors import RecipeError, UnsupportedModelError
from smoothq.plan.resolve import make_plan


def on_meta(**sizes: int) -> PreTrainedModel:
    """A Llama of SmolLM2-135M's widths, without memory."""
    widths = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(LlamaConfig(**(widths | heads | sizes)))


def test_bits_count_every_scale() -> None:
    bits = make_plan(on_meta(), preset("w8a8", "rtn")).bits
    elements = 576 * 576 * 2 + 576 * 192 * 2 + 576 * 1536 * 3
    rows = 576 * 2 + 192 * 2 + 1536 * 2 + 576
    assert bits.weight == pytest.approx(8 + 32 * rows / elements)
    inputs = [576, 576, 576, 1536]
    assert bits.activation == pytest.approx(8 + 32 * len(inputs) / sum(inputs))
    assert bits.activation_decode == bits.activation


def test_multipliers_count_as_they_are_stored() -> None:
    recipe = preset("w4a4")
    bits = make_plan(on_meta(), recipe).bits
    per_channel = make_plan(on_meta(), recipe.edit(weights__group_scale="float")).bits
    assert bits.weight == pytest.approx(4 + 8 / 32 + 32 * 5184 / 3_538_944, rel=1e-3)
    assert per_channel.weight == pytest.approx(4 + 16 / 32)
    # A multiplier and its sign take 4 bits a group of 16.
    assert bits.activation == pytest.approx(4 + 4 / 16 + 32 * 4 / 3264)


@pytest.mark.parametrize("name", ["w4a4", "w4a8"])
def test_defaults_stay_within_4_3_bits_in_prefill_and_decode(name) -> None:
    bits = make_plan(on_meta(), preset(name)).bits
    assert bits.weight <= 4.3
    assert name == "w4a8" or max(bits.activation, bits.activation_decode) <= 4.3


@pytest.mark.parametrize(
    ("recipe", "limit"), [(preset("w4a4", "quarot"), 0.27), (preset("w4a4"), 0.28)]
)
def test_packed_linears_take_about_a_quarter_of_bfloat16(recipe, limit) -> None:
    model = on_meta()
    elements = sum(p.numel() for name, p in model.named_parameters() if "proj" in name)
    assert make_plan(model, recipe).linear_bytes <= limit * 2 * elements


def test_live_scales_cost_more_in_decode_than_in_prefill() -> None:
    bits = make_plan(on_meta(), preset("w4a4", "rrs", "live")).bits
    assert bits.activation_decode - bits.activation > 0.2


def test_auto_takes_the_largest_group_that_divides() -> None:
    plan = make_plan(on_meta(), preset("w4a16").edit(weights__group_size="auto"))
    sizes = {
        name: spec.grid.group_size
        for site in plan.blocks[0].sites
        for name, spec in site.modules.items()
    }
    assert sizes["self_attn.q_proj"] == 64
    assert sizes["mlp.down_proj"] == 128


def test_auto_refuses_a_width_that_none_divides() -> None:
    with pytest.raises(RecipeError, match="none of the group sizes"):
        make_plan(on_meta(hidden_size=540), preset("w4a16").edit(weights__group_size="auto"))


def test_a_width_without_a_hadamard_matrix_is_said_by_name() -> None:
    plan = make_plan(on_meta(intermediate_size=1712), preset("w4a4", "quarot"))
    assert any("1712" in note and "block-diagonal" in note for note in plan.notes)
    assert make_plan(on_meta(), preset("w4a4", "quarot")).notes == ()


def test_experts_of_an_unknown_form_are_named_as_what_stays_in_float() -> None:
    model = on_meta()
    experts: Any = torch.nn.Module()
    experts.gate_up_proj = torch.nn.Parameter(torch.empty(4, 16, 8, device="meta"))
    blocks: Any = model.get_submodule("model.layers")
    blocks[1].mlp.experts = experts
    (note,) = make_plan(model, preset("w8a8")).notes
    assert note.startswith("1 stacks of matrices")
    assert note.endswith("model.layers.1.mlp.experts.gate_up_proj")


def test_layers_draw_their_own_value_rotation_and_seeds_differ() -> None:
    first, second = (make_plan(on_meta(), preset("w4a4").edit(seed=seed)) for seed in (0, 1))
    assert first.blocks[0].value_rotation != first.blocks[1].value_rotation
    assert first.residual_rotation != second.residual_rotation


@pytest.mark.parametrize("name", ["w8a8", "w4a8", "w4a4", "w4a16"])
def test_a_recipe_survives_yaml(name, tmp_path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(preset(name).to_yaml())
    assert load_recipe(file) == preset(name)


def test_presets_are_causal_and_the_papers_live_rrs_is_not() -> None:
    assert all(preset(name).causal for name in ("w8a8", "w4a8", "w4a4", "w4a16"))
    assert not preset("w4a4", "rrs", "live").causal
    assert not preset("w8a8").edit(activations__granularity="tensor").causal


def test_a_format_of_some_linears_that_mixes_tokens_makes_the_model_mix_them() -> None:
    one = {"match": "*.q_proj", "activations": {"bits": 8, "granularity": "tensor"}}
    assert not preset("w8a8").edit(overrides=(one,)).causal
    static = one | {"activations": one["activations"] | {"static": True}}
    assert preset("w8a8").edit(overrides=(static,)).causal


ZERO_POINTS = {"activations__bits": 16, "weights__symmetric": False}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"activations__static": True}, "granularity 'tensor'"),
        ({"weights__group_scale": "multiplier"}, "4-bit weights in groups"),
        ({"runtime_smoothing": {}}, "no room beside 8-bit"),
        ({"weights__bits": 1}, "weights.bits"),
        ({"activations__clip_ratio": 0}, "clip_ratio"),
        ({"nonsense": 1}, "nonsense"),
        ({"rotation__down": False}, "no rotation"),
        ({"activations__bits": 16, "runtime_smoothing": {}}, "≤ 8 bits"),
        (
            {"activations": {"bits": 16, "granularity": "tensor", "static": True}},
            "static scales need",
        ),
        ({"activations": {"full_range": True, "granularity": "tensor"}}, "of one scale a token"),
        ({"runtime_smoothing": {}, "activations": {"bits": 4, "full_range": True}}, "have it"),
        ({"runtime_smoothing": {}, "activations": {"bits": 4, "granularity": "tensor"}}, "per t"),
        ({"weights__symmetric": False}, "need float activations"),
        (ZERO_POINTS | {"weights__full_range": True}, "zero points go with"),
        (ZERO_POINTS | {"weights__granularity": "tensor"}, "zero points go with"),
        (
            ZERO_POINTS
            | {"weights": {"bits": 4, "granularity": "group", "group_scale": "multiplier"}},
            "zero points go with",
        ),
        ({"tuning": {}, "weights__granularity": "tensor"}, "a scale a row"),
        ({"kv_cache": {}, "attention": "int8-centred"}, "codes already"),
        ({"kv_cache__bits": 4}, "no kv cache"),
        ({"kv_cache": {"group_size": 32}, "attention": "int8"}, "one group a head"),
        ({"kv_cache": {"float_tokens": 4}, "attention": "int8"}, "one group a head"),
        ({"smoothing": {"alpha": {"norms": 0.5}}}, "no value for the edge up_down"),
        ({"weights__type": "float", "weights__bits": 4}, "are no format"),
        ({"weights__type": "float"}, "activations of the kind"),
        ({"weights__granularity": "block"}, "of floating-point weights"),
        ({"activations__granularity": "group"}, "of floating-point activations"),
        ({"activations": {"type": "float", "bits": 4}}, "in groups with scales"),
        ({"activations": {"type": "float", "group_scale": "e8m0"}}, "are of groups"),
        ({"activations": {"type": "float", "clip_ratio": 0.9}}, "of integer activations"),
    ],
)
def test_contradictions_are_refused(fields, message) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe().edit(**fields)


def test_live_smoothing_refuses_float_weight_groups() -> None:
    recipe = preset("w4a4", "rrs", "live")
    with pytest.raises(RecipeError, match="reorders the channels"):
        recipe.edit(weights__granularity="group")
    recipe.edit(weights__granularity="group", weights__group_scale="multiplier")


@pytest.mark.parametrize("dtype", [-1, "no_dtype", "int8", torch.int32])
def test_a_config_whose_dtype_is_none_is_refused(dtype) -> None:
    config = on_meta().config
    config.dtype = dtype
    with pytest.raises(UnsupportedModelError, match="dtype"):
        skeleton_of(config, "model")


FOUR_BITS = {"weights.bits": 4, "weights.clip": True}
GPTQ = {**FOUR_BITS, "weights.rounding": "gptq"}
OURS = {
    **GPTQ,
    **{"weights.granularity": "group", "weights.group_size": 32},
    **{"weights.group_scale": "multiplier", "smoothing.edges": ("up_down",)},
    **{"tuning.steps": 16, "rotation": {}},
}
TOKEN_GROUPS = {"runtime_smoothing.group_size": 16, "runtime_smoothing.scope": "token"}
NORMS = {"smoothing.edges": ("norms", "up_down")}
UP_DOWN = {"smoothing.edges": ("up_down",), "rotation": {}}
CLIPPED = {"activations.clip_ratio": 0.9}
PRESETS = {  # what each sets, beside its bits of activations
    ("w8a8", None): NORMS,
    ("w4a8", None): OURS,
    ("w4a4", None): OURS | TOKEN_GROUPS | {"activations.clip_ratio": 0.925},
    ("w4a16", None): OURS,
    ("w8a8", "rtn"): {},
    ("w8a8", "smoothquant"): NORMS,
    ("w8a8", "quarot"): {"rotation": {}},
    ("w8a8", "smoothrot"): UP_DOWN,
    ("w4a8", "rtn"): FOUR_BITS,
    ("w4a8", "smoothquant"): GPTQ | NORMS,
    ("w4a8", "quarot"): GPTQ | {"rotation": {}},
    ("w4a8", "smoothrot"): GPTQ | UP_DOWN,
    ("w4a4", "rtn"): FOUR_BITS,
    ("w4a4", "smoothquant"): GPTQ | NORMS,
    ("w4a4", "quarot"): GPTQ | CLIPPED | {"rotation": {}},
    ("w4a4", "smoothrot"): GPTQ | CLIPPED | UP_DOWN,
    ("w4a4", "rs"): GPTQ | TOKEN_GROUPS,
    ("w4a4", "rrs"): GPTQ | TOKEN_GROUPS | {"rotation": {}},
}


@pytest.mark.parametrize(("name", "method"), PRESETS)
def test_a_preset_sets_these_fields_and_no_other(name, method) -> None:
    values: dict[str, object] = {"activations": {"bits": int(name.partition("a")[2])}}
    for path, value in PRESETS[name, method].items():
        section, _, field = path.rpartition(".")
        values.setdefault(section or path, {})
        if section:
            values[section][field] = value
    assert preset(name, method) == Recipe(**values, name=preset(name, method).name)


@pytest.mark.parametrize("name", ["w8a8", "w4a8", "w4a16"])
@pytest.mark.parametrize("method", ["rs", "rrs"])
def test_runtime_smoothing_is_for_four_bit_activations(name, method) -> None:
    with pytest.raises(RecipeError, match=f"method={method} smooths 4-bit activations"):
        preset(name, method)
