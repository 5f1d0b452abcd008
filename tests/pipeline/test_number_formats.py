"""Every preset of a number format: quantized, stored, loaded, run, and run token by token."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, LlamaForCausalLM

from smoothq import kernels, preset, quantize
from smoothq.advisor.costs import advise
from smoothq.errors import RecipeError
from smoothq.modules import InputQuantizer, InputSpec, QuantizedLinear, WeightSpec
from smoothq.plan.portability import refuse_in_plugin
from smoothq.plan.resolve import make_plan
from smoothq.plan.sites import weight_grid
from smoothq.report.figures import remarks
from smoothq.rounding.rtn import round_to_nearest
from tests.tiny_models import wide_llama

FORMATS = ["fp8", "fp8-block", "w4a8-fp8", "mxfp8", "mxfp4", "nvfp4", "w4a16-nvfp4"]
WORDS = ["w3a16", "w2a16"]
EMULATED = [name for name in FORMATS if name != "w4a16-nvfp4"]
TOKENS = torch.randint(0, 96, (2, 24), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def source() -> LlamaForCausalLM:
    return wide_llama(intermediate_size=320)


@pytest.fixture(scope="module")
def made(source, tmp_path_factory) -> Callable[..., LlamaForCausalLM]:
    """A quantized model, loaded from where it was stored; the run itself compares the two."""
    data = torch.randint(0, 96, (4, 64), generator=torch.Generator().manual_seed(5))
    place = tmp_path_factory.mktemp("formats")
    known: dict[str, LlamaForCausalLM] = {}

    def of(name: str, plain: bool = False) -> LlamaForCausalLM:
        key = f"{name} plain" if plain else name
        if key not in known:
            recipe = preset(name)
            if recipe.tuning is not None:
                recipe = recipe.edit(tuning__steps=4)
            if plain:
                recipe = recipe.edit(tuning=None, rotation=None, smoothing=None)
                recipe = recipe.edit(weights__rounding="rtn", weights__clip=False)
            quantize(source, recipe, data=data, output=place / key)
            known[key] = AutoModelForCausalLM.from_pretrained(place / key, dtype="auto")
        return known[key]

    return of


@torch.no_grad()
def logits(model: LlamaForCausalLM, tokens: Tensor = TOKENS, **kwargs: object) -> Tensor:
    return model(input_ids=tokens, **kwargs).logits


def error(model: LlamaForCausalLM, source: LlamaForCausalLM) -> float:
    exact = logits(source)
    return float((logits(model) - exact).norm() / exact.norm())


@pytest.mark.parametrize("name", [*FORMATS, *WORDS])
def test_it_is_no_worse_than_plain_rounding(made, source, name) -> None:
    assert error(made(name), source) < 1.1 * error(made(name, plain=True), source)


@pytest.mark.parametrize("name", [*FORMATS, *WORDS])
def test_prefill_and_a_decode_step_agree_with_a_longer_prefill(made, name) -> None:
    model = made(name)
    cache = DynamicCache(config=model.config)
    logits(model, TOKENS[:, :-1], past_key_values=cache, use_cache=True)
    step = logits(model, TOKENS[:, -1:], past_key_values=cache, use_cache=True)
    whole = logits(model)[:, -1:]
    # A product of one token adds in another order; what is near a tie may then round otherwise.
    assert float((step - whole).norm() / whole.norm()) < 0.02


@pytest.mark.parametrize("name", [*FORMATS, *WORDS])
def test_what_is_emulated_is_called_so(made, name) -> None:
    report = kernels.report(made(name))
    assert ("(emulated)" in report) == (name in EMULATED)
    assert ("fp_gemm" in report) == (name not in (*WORDS, "w4a8-fp8"))


def test_scales_keep_their_dtype_where_a_model_is_cast(made) -> None:
    model = copy.deepcopy(made("nvfp4"))
    scales = {name: b for name, b in model.named_buffers() if name.endswith("scale")}
    assert any(name.endswith("input.scale") for name in scales)
    model.to(torch.bfloat16)
    cast = dict(model.named_buffers())
    assert all(torch.equal(cast[name], scale) for name, scale in scales.items())


def test_a_plan_says_that_products_are_emulated(source) -> None:
    plan = make_plan(source, preset("nvfp4"))
    (asked,) = (cost for cost in advise(source, plan).costs if cost.name == "as asked")
    assert asked.products == "16-bit float (emulated)"
    assert [line for line in remarks(plan, "MODEL") if "emulates" in line]
    with pytest.raises(RecipeError, match="runs integer codes"):
        refuse_in_plugin(plan)


@pytest.mark.parametrize("name", ["fp8", "fp8-block", "mxfp8", "mxfp4", "nvfp4"])
def test_a_linear_of_one_output_is_multiplied(name) -> None:
    grid = weight_grid(preset(name), 128, "head")
    rounded = round_to_nearest(torch.randn(1, 128), grid)
    linear = QuantizedLinear(
        WeightSpec(1, 128, grid), InputQuantizer("x", InputSpec(128, 16, "float")), torch.float32
    )
    linear.set_weight(rounded, None)
    x = torch.randn(3, 128)
    torch.testing.assert_close(linear(x), x @ rounded.dequantize().T, rtol=1e-4, atol=1e-4)


NVFP4 = preset("nvfp4")
STATIC = {"bits": 8, "granularity": "tensor", "static": True}


@pytest.mark.parametrize(
    "override",
    [
        {"activations": NVFP4.activations.model_dump()},
        {"activations": {"type": "float"} | STATIC},
        {"activations": {"type": "float"}, "weights": NVFP4.weights.model_dump()},
    ],
)
def test_what_an_override_needs_is_calibrated_in_a_recipe_that_needs_nothing(
    source, override
) -> None:
    plain = preset("fp8").edit(smoothing=None, weights__rounding="rtn")
    assert not plain.calibrates
    recipe = plain.edit(overrides=({"match": "*.down_proj"} | override,))
    assert recipe.calibrates
    assert recipe.sees_quantized


def test_the_scale_of_inputs_in_nvfp4_is_measured_where_only_an_override_has_them(source) -> None:
    data = torch.randint(0, 96, (2, 32), generator=torch.Generator().manual_seed(5))
    formats = NVFP4.edit(weights__rounding="rtn")
    override = {
        "match": "*.down_proj",
        "weights": formats.weights.model_dump(),
        "activations": formats.activations.model_dump(),
    }
    plain = preset("fp8").edit(smoothing=None, weights__rounding="rtn", overrides=(override,))
    scales = [
        module.scale
        for module in quantize(source, plain, data=data, check=False).modules()
        if isinstance(module, InputQuantizer) and module.spec.calibrates_scale
    ]
    assert len(scales) == 2
    assert all(0 < float(scale) < 1 for scale in scales)
