"""What a site costs alone, and the mixed-precision recipe that is made of it."""

import copy
import re
from fnmatch import fnmatchcase

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from smoothq import Recipe, load_recipe, preset, quantize
from smoothq.checkpoint.open import open_source
from smoothq.errors import CalibrationError, RecipeError
from smoothq.evaluation.divergence import agreement
from smoothq.evaluation.perplexity import perplexity
from smoothq.inspection.sensitivity import (
    AS_ASKED,
    RICH,
    Choice,
    Sensitivities,
    SiteSensitivity,
    measure,
    mixed_recipe,
    with_choices,
)
from smoothq.modules import QuantizedLinear
from smoothq.plan.resolve import make_plan
from smoothq.rounding.grid import IntegerGrid
from smoothq.rounding.rtn import round_to_nearest
from tests.conftest import RECIPES
from tests.tiny_models import VOCABULARY, tiny_model

FOUR_BITS = Recipe(name="plain").edit(weights__bits=4, activations__bits=16)


@pytest.fixture(scope="module")
def found(data) -> Sensitivities:
    """Of the tiny Llama under the preset W4A4."""
    return measure(open_source(tiny_model("llama", torch.float32)), RECIPES["w4a4"], data)


def down_of(model: PreTrainedModel, block: int) -> torch.nn.Linear:
    return model.get_submodule(f"model.layers.{block}.mlp.down_proj")


def test_a_unit_costs_what_rounding_its_weights_by_hand_does(data) -> None:
    model = tiny_model("llama", torch.float32)
    found = measure(open_source(model), FOUR_BITS, data)
    by_hand = copy.deepcopy(model)
    weight = down_of(by_hand, 1).weight
    grid = IntegerGrid(4, "channel", weight.shape[1], False, False)
    weight.copy_(round_to_nearest(weight, grid).dequantize())
    unit = next(unit for unit in found.units if (unit.block, unit.site) == (1, "down"))
    assert unit.asked.divergence == pytest.approx(
        agreement(by_hand, model, data).divergence, rel=1e-4
    )
    text = data.reshape(1, -1)
    perplexities = [perplexity(each, text, data.shape[1]).perplexity for each in (by_hand, model)]
    assert found.perplexity == pytest.approx(perplexities[1])
    assert unit.asked.perplexity_ratio == pytest.approx(perplexities[0] / perplexities[1], rel=1e-5)


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("llama", "w4a4"),
        ("llama", "w8a8-static"),
        ("llama", "w4a4-rrs-calibrated"),
        ("llama-untied", "w4a4-rrs-live"),
        ("gpt2", "w4a8"),
        ("gemma2", "w4a4"),
        ("mixtral", "w4a8"),
    ],
)
def test_a_unit_costs_what_a_model_does_that_keeps_everything_else(name, recipe, data) -> None:
    model, text = tiny_model(name, torch.float32), data.clamp(max=90)
    nearest = RECIPES[recipe].edit(weights__rounding="rtn", tuning=None)
    found = measure(open_source(model), nearest, text)
    modules = {module for unit in found.units for module in unit.modules}
    for unit in found.units[1:4]:
        alone = nearest.edit(keep=tuple(sorted(modules - set(unit.modules))))
        quantized = quantize(model, alone, data=text, check=False)
        divergence = agreement(quantized, model, text).divergence
        assert unit.asked.divergence == pytest.approx(divergence, rel=1e-2)  # a code may flip


def test_measuring_leaves_the_model_as_it_is_and_gives_the_same_twice(found, data) -> None:
    model = tiny_model("llama", torch.float32)
    source = open_source(model)
    assert measure(source, RECIPES["w4a4"], data) == found
    stock = tiny_model("llama", torch.float32).state_dict()
    assert all(torch.equal(tensor, stock[name]) for name, tensor in model.state_dict().items())


def test_units_are_the_sites_in_order_ranked_by_divergence(found) -> None:
    sites = [(unit.block, unit.site) for unit in found.units]
    assert sites == [(i, site) for i in range(3) for site in ("qkv", "o", "gate_up", "down")]
    assert found.units[2].modules == ("model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj")
    costs = [unit.asked.divergence for unit in found.ranked]
    assert costs == sorted(costs, reverse=True)
    for unit in found.units:
        asked, rich = unit.choices
        assert 0 < rich.divergence < asked.divergence


def test_progress_goes_from_block_to_block(data) -> None:
    told: list[tuple[int, int, str]] = []
    source = open_source(tiny_model("llama", torch.float32))
    measure(source, FOUR_BITS, data[:1], lambda *each: told.append(each))
    assert [block for block, _, _ in told] == sorted(block for block, _, _ in told)
    assert told[-1] == (2, 3, "measure down")


@pytest.mark.parametrize("share", [0.0, 0.1, 0.37, 0.9, 1.0])
def test_the_budget_is_kept_and_used(found, share) -> None:
    least, most = found.bits_with(found.asked), found.bits_with(found.largest)
    budget = least + share * (most - least)
    mixed = mixed_recipe(found, RECIPES["w4a4"], budget)
    plan = make_plan(tiny_model("llama", torch.float32), mixed)
    assert least <= plan.bits.weight <= budget
    chosen = [
        unit.choices[any(fnmatchcase(unit.modules[0], each.match) for each in mixed.overrides)]
        for unit in found.units
    ]
    assert plan.bits.weight == found.bits_with(chosen)
    for index, unit in enumerate(found.units):
        richer = [*chosen[:index], unit.choices[1], *chosen[index + 1 :]]
        assert richer == chosen or found.bits_with(richer) > budget


def test_a_budget_below_the_recipe_is_refused_with_what_would_do(found) -> None:
    least, most = found.bits_with(found.asked), found.bits_with(found.largest)
    with pytest.raises(RecipeError, match=r"4\.1 bits .* from \d\.\d+,.* to \d\.\d+,") as refused:
        mixed_recipe(found, RECIPES["w4a4"], 4.1)
    bounds = [float(each) for each in re.findall(r"\d\.\d{4}", str(refused.value))]
    assert bounds == pytest.approx([least, most], abs=1e-4)
    assert mixed_recipe(found, RECIPES["w4a4"], bounds[0]).overrides == ()


def test_a_recipe_of_8_bits_leaves_nothing_to_choose(data) -> None:
    found = measure(open_source(tiny_model("llama", torch.float32)), RECIPES["w8a8"], data[:1])
    assert all(len(unit.choices) == 1 for unit in found.units)
    with pytest.raises(RecipeError, match="nothing to choose"):
        mixed_recipe(found, RECIPES["w8a8"], 9.0)


def test_kept_linears_count_and_are_no_units(data) -> None:
    model = tiny_model("llama", torch.float32)
    recipe = RECIPES["w4a8"].edit(keep=("*.layers.0.*", "*.q_proj"))
    found = measure(open_source(model), recipe, data[:1])
    assert {unit.block for unit in found.units} == {1, 2}
    assert found.bits_with(found.asked) == make_plan(model, recipe).bits.weight


def test_a_site_made_sensitive_is_ranked_and_chosen_first(data) -> None:
    model = tiny_model("llama", torch.float32)
    # Exact in binary: the function stays, but 4 bits round these columns to zero.
    model.get_submodule("model.layers.1.mlp.up_proj").weight[:40] *= 16
    down_of(model, 1).weight[:, :40] /= 16
    recipe = FOUR_BITS.edit(activations__bits=8)
    found = measure(open_source(model), recipe, data)
    worst = found.ranked[0]
    assert (worst.block, worst.site) == (1, "down")
    chosen = [unit.choices[unit == worst] for unit in found.units]
    mixed = mixed_recipe(found, recipe, found.bits_with(chosen))
    assert [each.match for each in mixed.overrides] == ["model.layers.1.mlp.down_proj"]
    errors = [
        agreement(quantize(model, each, data=data, check=False), model, data).divergence
        for each in (recipe, mixed)
    ]
    saved = worst.choices[0].divergence - worst.choices[1].divergence
    assert errors[0] - errors[1] == pytest.approx(saved, rel=0.3)


def test_the_recipe_survives_yaml_and_quantize_runs_with_it(
    found, float_checkpoint, data, tmp_path
) -> None:
    budget = found.bits_with(found.asked) + 1
    mixed = mixed_recipe(found, RECIPES["w4a4"], budget)
    file = tmp_path / "recipe.yaml"
    file.write_text(mixed.to_yaml())
    assert load_recipe(file) == mixed
    model = quantize(float_checkpoint("llama"), load_recipe(file), data=data, check=False)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    rich = {n for n, m in linears.items() if m.spec.grid.bits == 8}
    assert rich == {n for n in linears if any(fnmatchcase(n, e.match) for e in mixed.overrides)}
    assert rich
    for name, linear in linears.items():
        expected = (8, "token") if name in rich else (4, "smooth_token")
        assert (linear.site_input.spec.bits, linear.site_input.spec.mode) == expected


def test_one_pattern_stands_for_a_module_in_up_to_ten_blocks() -> None:
    choices = (Choice(AS_ASKED, 4, 1.0, 1.0), Choice(RICH, 8, 0.0, 1.0))

    def unit(block: int) -> SiteSensitivity:
        return SiteSensitivity(block, "down", (f"model.layers.{block}.mlp.down_proj",), 1, choices)

    units = tuple(unit(block) for block in (12, 0, 3, 10, 27))
    overrides = with_choices(
        Recipe(), Sensitivities(units, 5, 0, 1.0, 1), [unit.choices[1] for unit in units]
    ).overrides
    assert [each.match for each in overrides] == [
        "model.layers.[03].mlp.down_proj",
        "model.layers.1[02].mlp.down_proj",
        "model.layers.27.mlp.down_proj",
    ]
    matched = [
        any(fnmatchcase(unit(block).modules[0], each.match) for each in overrides)
        for block in range(40)
    ]
    assert [block for block in range(40) if matched[block]] == [0, 3, 10, 12, 27]


def test_a_recipes_own_overrides_stay_behind_the_new_ones(found) -> None:
    own = RECIPES["w4a4"].edit(overrides=({"match": "*.o_proj", "weights": {"bits": 8}},))
    chosen = [found.units[0].choices[1], *found.asked[1:]]
    mixed = with_choices(own, found, chosen)
    assert mixed.overrides[-1] == own.overrides[0]
    assert mixed.for_module("model.layers.0.self_attn.q_proj").weights.bits == 8


@pytest.mark.parametrize("shape", [(0, 8), (2, 1), (8,)])
def test_tokens_of_another_shape_are_refused(shape) -> None:
    source = open_source(tiny_model("llama", torch.float32))
    with pytest.raises(CalibrationError, match="windows, length of 2 or more"):
        measure(source, FOUR_BITS, torch.zeros(shape, dtype=torch.int64))


FORMATS = ("mxfp4", "nvfp4", "w4a16-nvfp4", "w4a8", "w4a4", "fp8")


@pytest.fixture(scope="module")
def wide() -> PreTrainedModel:
    """A tiny Llama whose widths groups of 32 divide."""
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "initializer_range": 0.2,
    }
    config = LlamaConfig(
        **sizes, num_attention_heads=2, num_key_value_heads=2, vocab_size=VOCABULARY
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def among(wide, data) -> Sensitivities:
    """Of that model under the preset NVFP4, among number formats."""
    return measure(open_source(wide), preset("nvfp4"), data, among=FORMATS)


def test_number_formats_are_choices_with_their_bits_and_their_own_is_no_second(among, wide) -> None:
    for unit in among.units:
        names = (AS_ASKED, *(name for name in FORMATS if name != "nvfp4"))
        assert tuple(choice.name for choice in unit.choices) == names
    for place, name in enumerate(names):
        formats = preset("nvfp4" if name == AS_ASKED else name)
        plan = make_plan(wide, formats)
        bits = among.bits_with(unit.choices[place] for unit in among.units)
        assert bits == plan.bits.weight


def test_a_format_costs_what_a_model_does_that_keeps_everything_else(among, wide, data) -> None:
    unit = among.units[3]
    others = {module for each in among.units for module in each.modules} - set(unit.modules)
    for name in ("mxfp4", "w4a8"):
        recipe = preset("nvfp4").edit(weights__rounding="rtn", tuning=None, keep=tuple(others))
        (choice,) = (each for each in unit.choices if each.name == name)
        chosen = [choice if each is unit else each.asked for each in among.units]
        alone = with_choices(recipe, among, chosen)
        quantized = quantize(wide, alone, data=data, check=False)
        divergence = agreement(quantized, wide, data).divergence
        assert choice.divergence == pytest.approx(divergence, rel=1e-2)  # a code may flip


@pytest.mark.parametrize("share", [0.0, 0.2, 0.6, 1.0])
def test_no_single_other_format_that_fits_costs_less(among, share) -> None:
    least, most = among.bits_with(among.smallest), among.bits_with(among.largest)
    budget = least + share * (most - least)
    chosen = among.choose(budget)
    assert among.bits_with(chosen) <= budget
    for index, unit in enumerate(among.units):
        for choice in unit.choices:
            other = [*chosen[:index], choice, *chosen[index + 1 :]]
            cheaper = choice.divergence < chosen[index].divergence
            assert not cheaper or among.bits_with(other) > budget


@pytest.mark.parametrize("asked", ["nvfp4", "fp8", "w4a16"])
def test_a_mixture_of_number_formats_is_stored_and_loaded(asked, wide, data, tmp_path) -> None:
    recipe = preset(asked)
    formats = ("nvfp4", "mxfp4", "fp8", "w4a16-nvfp4")
    among = measure(open_source(wide), recipe, data, among=formats)
    # Every format once, whatever it costs.
    chosen = [unit.choices[i % len(unit.choices)] for i, unit in enumerate(among.units)]
    mixed = with_choices(recipe, among, chosen)
    file = tmp_path / "recipe.yaml"
    file.write_text(mixed.to_yaml())
    assert load_recipe(file) == mixed
    assert make_plan(wide, mixed).bits.weight == among.bits_with(chosen)
    result = quantize(wide, mixed, data=data, output=tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(loaded(data).logits, result.load()(data).logits)


def test_a_format_is_rounded_as_the_recipe_is(among) -> None:
    recipe = preset("nvfp4").edit(weights__rounding="rtn", tuning=None)
    mixed = with_choices(recipe, among, among.largest)
    assert {each.weights.rounding for each in mixed.overrides} == {"rtn"}


def test_linears_that_stay_in_float_by_default_do_so_in_every_format(data) -> None:
    model = tiny_model("qwen2_moe", torch.float32)
    found = measure(open_source(model), preset("fp8"), data[:1], among=("nvfp4",))
    assert not any("shared_expert_gate" in name for unit in found.units for name in unit.modules)
    assert all(len(unit.choices) == 2 for unit in found.units)


def test_an_unknown_preset_to_choose_among_is_refused_by_name(data) -> None:
    source = open_source(tiny_model("llama", torch.float32))
    with pytest.raises(RecipeError, match="no preset 'fp9'"):
        measure(source, FOUR_BITS, data, among=("fp9",))
