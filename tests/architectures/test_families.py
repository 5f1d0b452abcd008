"""Every family: its graphs name the real weights, its transforms keep the function, it runs."""

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    CLIPConfig,
    GraniteConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from smoothq import Recipe, architectures, preset, quantize
from smoothq.advisor import families
from smoothq.architectures import (
    BlockGraph,
    Family,
    Heads,
    Norm,
    Rows,
    Site,
    WeightRef,
    family_of,
    register_family,
    supported_model_types,
)
from smoothq.architectures.graph import takes_rotation, text_config
from smoothq.architectures.linearize import linearize_block, restore_block
from smoothq.checkpoint.skeleton import empty_model
from smoothq.discovery import equivalence as equivalence
from smoothq.discovery.infer import discover_family, prove_family
from smoothq.errors import RecipeError, SmoothqError, UnsupportedModelError
from smoothq.modules import QuantizedLinear
from smoothq.modules.kv_cache import QuantizedLayer
from smoothq.plan.resolve import make_plan
from tests.conftest import RECIPES
from tests.tiny_models import TINY, tiny_model

TOKENS = torch.randint(90, (2, 24), generator=torch.Generator().manual_seed(1))
VISIBLE = 1e-3  # a change of the logits that no rounding explains

HEADS = {
    "wide": Heads(4, 2, 16),
    "grouped": Heads(6, 2, 16),
    "each": Heads(6, 6, 16),
    "one": Heads(6, 1, 16),
}
HEADS_OF = dict.fromkeys(TINY, HEADS["wide"])
HEADS_OF |= dict.fromkeys(
    ("mistral", "qwen2", "phi3", "olmo2", "cohere", "falcon-groups", "mixtral", "qwen2_moe"),
    HEADS["grouped"],
)
HEADS_OF |= dict.fromkeys(
    ("opt", "bloom", "bloom-untied", "gpt2", "gpt_neox", "gpt_neox-serial", "falcon-alibi"),
    HEADS["each"],
)
HEADS_OF["falcon"] = HEADS["one"]
RS_ALL = "token, calibrated, live"
POST_NORMS = ["glm4", "gemma2", "gemma3_text", "gemma3", "olmo2"]
WITHOUT_GATE = ["bloom", "bloom-untied", "gpt2", "gpt_neox", "gpt_neox-serial"]
WITHOUT_GATE += ["falcon", "falcon-alibi", "falcon-groups", "gpt_oss"]
WITH_EXPERTS = ["mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss"]


def family_named(name: str) -> Family:
    family = family_of(TINY[name]().get_text_config(decoder=True))
    assert family is not None
    return family


def opened(name: str, dtype: torch.dtype = torch.float64) -> tuple[PreTrainedModel, Family]:
    model, family = tiny_model(name, dtype), family_named(name)
    equivalence.open_blocks(model, family)
    return model, family


def first_block(name: str) -> tuple[PreTrainedModel, nn.Module, BlockGraph]:
    model, family = opened(name)
    return model, *next(equivalence.graphs(model, family))


@cache
def known_block(name: str) -> tuple[PreTrainedModel, nn.Module, BlockGraph]:
    """The first block, made once: for tests that leave it as it is."""
    return first_block(name)


def all_refs(graph: BlockGraph) -> list[WeightRef]:
    """Every weight that reads a site, each once: together these are all the matrices of a block."""
    return [reader for site in graph.sites for reader in site.all_readers]


@pytest.mark.parametrize("name", TINY)
class TestEveryGraph:
    def test_readers_share_the_width_of_their_site(self, name: str) -> None:
        model, block, graph = known_block(name)
        heads = HEADS_OF[name]
        for site in graph.sites:
            widths = {reader.view(block).shape[1] for reader in site.all_readers}
            assert len(widths) == 1
            if site.reads == "residual":
                assert widths == {text_config(model).hidden_size}
            if site.reads == "attention":
                assert widths == {heads.query * heads.dim}

    def test_producers_fit_the_width_of_their_site(self, name: str) -> None:
        _, block, graph = known_block(name)
        for site in graph.sites:
            width = site.readers[0].view(block).shape[1]
            if isinstance(site.producer, Norm):
                assert block.get_parameter(site.producer.weight).shape == (width,)
            elif isinstance(site.producer, Rows):
                heads = site.producer.heads
                rows = sum(len(ref.view(block)) for ref in site.producer.refs)
                assert rows == (width if heads is None else heads.key_value * heads.dim)

    def test_residual_writers_write_the_hidden_size(self, name: str) -> None:
        model, block, graph = known_block(name)
        assert (graph.residual_writers == ()) == (name in POST_NORMS)
        for writer in graph.residual_writers:
            assert writer.view(block).shape[0] == text_config(model).hidden_size
            assert writer in all_refs(graph)

    def test_readers_cover_every_weight_and_bias_exactly_once(self, name: str) -> None:
        _, block, graph = first_block(name)
        norms = [n for n, m in block.named_modules() if "Norm" in type(m).__name__]
        linear = {
            n: parameter.zero_()
            for n, parameter in block.named_parameters()
            if n.rpartition(".")[0] not in norms and not n.endswith("sinks")
        }
        for ref in all_refs(graph):
            ref.view(block).add_(1)
            if (bias := ref.bias_view(block)) is not None:
                bias.add_(1)
        for parameter in linear.values():
            assert torch.equal(parameter, torch.ones_like(parameter))

    def test_heads_come_from_the_config(self, name: str) -> None:
        *_, graph = known_block(name)
        assert graph.value_output.producer.heads == HEADS_OF[name]

    def test_edges_follow_from_the_wiring(self, name: str) -> None:
        *_, graph = known_block(name)
        edges = {site.edge for site in graph.sites}
        assert ("up_down" in edges) == (name not in WITHOUT_GATE)
        assert ("norms" in edges) == (name != "olmo2")

    def test_parts_are_where_the_model_has_them(self, name: str) -> None:
        model, _, _ = known_block(name)
        parts = family_named(name).parts(model)
        assert model.get_submodule(parts.embedding) is model.get_input_embeddings()
        assert model.get_submodule(parts.head) is model.get_output_embeddings()
        assert len(model.get_submodule(parts.layers)) == text_config(model).num_hidden_layers
        final_norm = model.get_submodule(parts.final_norm)
        assert final_norm.weight.shape == (text_config(model).hidden_size,)
        centred_with_a_bias = name.startswith(("bloom", "gpt_neox", "falcon", "gpt2", "opt"))
        assert parts.folds_head(model) != centred_with_a_bias

    def test_sites_come_in_the_order_of_execution_and_their_readers_read_one_tensor(
        self, name: str
    ) -> None:
        model, block, graph = first_block(name)
        calls: list[tuple[str, Tensor]] = []
        for module in {reader.module for reader in all_refs(graph) if not reader.routed}:
            block.get_submodule(module).register_forward_pre_hook(
                lambda _, inputs, module=module: calls.append((module, inputs[0]))
            )
        model(TOKENS)
        inputs = dict(calls)
        order = [module for module, _ in calls]
        sites = [site for site in graph.sites if not site.readers[0].routed]
        assert order.index(sites[0].modules[0]) == 0
        firsts = [order.index(site.modules[0]) for site in sites]
        assert firsts == sorted(firsts)
        for site in sites:
            shared = [module for module in site.modules if module in inputs]
            assert len({inputs[module].data_ptr() for module in shared}) == 1


class TestOpening:
    @pytest.mark.parametrize("name", TINY)
    def test_an_opened_model_computes_what_it_did_and_closes_again(self, name: str) -> None:
        model, family = tiny_model(name), family_named(name)
        before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        logits = equivalence.logits(model, TOKENS)
        equivalence.open_blocks(model, family)
        assert equivalence.deviation(equivalence.logits(model, TOKENS), logits) < 1e-14
        stock = tiny_model(name, seed=1).get_submodule(family.parts(model).layers)
        for block, fresh in zip(
            model.get_submodule(family.parts(model).layers), stock, strict=True
        ):
            restore_block(block, fresh)
            assert type(block) is type(fresh)
        after = model.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[key], before[key]) for key in before)

    def test_a_conv1d_becomes_a_linear_with_its_bias(self) -> None:
        block = nn.ModuleDict({"fused": Conv1D(6, 4)}).requires_grad_(False)
        weight, x = block["fused"].weight.clone(), torch.randn(3, 4)
        expected = block["fused"](x)
        linearize_block(block)
        assert isinstance(block["fused"], nn.Linear)
        assert torch.equal(block["fused"].weight, weight.t())
        torch.testing.assert_close(block["fused"](x), expected)


CLAIMS = [
    pytest.param(name, claim, dtype, id=f"{name}-{claim}-{dtype}".replace(" ", "-"))
    for name in TINY
    for claim in (*equivalence.claims(*opened(name)), "all together")
    for dtype in equivalence.TOLERANCE
    if dtype == torch.float64 or claim == "all together"
]


def rewritten(name: str, claim: str, dtype: torch.dtype) -> PreTrainedModel:
    model, family = opened(name, dtype)
    rewrite = (
        equivalence.everything
        if claim == "all together"
        else equivalence.claims(model, family)[claim]
    )
    rewrite(model, family)
    return model


@cache
def original_logits(name: str, dtype: torch.dtype = torch.float64) -> Tensor:
    return equivalence.logits(tiny_model(name, dtype), TOKENS)


@cache
def original_parameters(name: str) -> dict[str, Tensor]:
    """The parameters of the opened float64 model, which no test changes."""
    return dict(opened(name)[0].named_parameters())


def changed_names(model: PreTrainedModel, name: str) -> set[str]:
    """The names of the parameters that differ from the original model's."""
    before = original_parameters(name)
    return {
        n
        for n, now in model.named_parameters()
        if n not in before or not torch.equal(now, before[n])
    }


class TestTheFunctionIsKept:
    @pytest.mark.parametrize(("name", "claim", "dtype"), CLAIMS)
    def test_weights_change_and_logits_stay(
        self, name: str, claim: str, dtype: torch.dtype
    ) -> None:
        model = rewritten(name, claim, dtype)
        assert dtype != torch.float64 or changed_names(model, name)
        now = equivalence.logits(model, TOKENS)
        assert (
            equivalence.deviation(now, original_logits(name, dtype)) < equivalence.TOLERANCE[dtype]
        )

    @pytest.mark.parametrize("name", TINY)
    def test_each_changed_weight_is_needed(self, name: str) -> None:
        original = original_parameters(name)
        model = rewritten(name, "all together", torch.float64)
        changed = changed_names(model, name)
        tried = [n for n in changed if ".1." in n and n in original and "k_proj.bias" not in n]
        assert len(tried) >= 4
        for parameter in tried:
            now = model.get_parameter(parameter)
            kept = now.clone()
            now.copy_(original[parameter])
            assert (
                equivalence.deviation(equivalence.logits(model, TOKENS), original_logits(name))
                > VISIBLE / 10
            )
            now.copy_(kept)

    @pytest.mark.parametrize("name", [name for name in TINY if name not in POST_NORMS])
    def test_rotating_the_blocks_without_the_ends_is_seen(self, name: str) -> None:
        model, family = opened(name)
        equivalence.fuse(model, family)
        rotation = equivalence.Hadamard.of(text_config(model).hidden_size, 5, family.centred)
        for block, graph in equivalence.graphs(model, family):
            equivalence.rotate_residual(block, graph, rotation)
        assert (
            equivalence.deviation(equivalence.logits(model, TOKENS), original_logits(name))
            > VISIBLE
        )

    @pytest.mark.parametrize("name", ["opt", "gpt2", "cohere"])
    def test_a_layer_norm_needs_a_rotation_that_keeps_the_mean(self, name: str) -> None:
        model, family = opened(name)
        loses = Family(**{**vars(family), "centred": False})
        equivalence.rotate_stream(model, loses)
        assert (
            equivalence.deviation(equivalence.logits(model, TOKENS), original_logits(name))
            > VISIBLE
        )


def small(recipe: Recipe) -> Recipe:
    """A recipe whose experts need no more tokens than there are."""
    return recipe.edit(gptq__least_tokens=8)


def four_bits_in_turn() -> Iterator[Any]:
    """Every family with one of two 4-bit recipes in the fast tests, and with the other among slow.

    Families that are alike stand beside one another, so that each kind meets both.
    """
    for number, name in enumerate(TINY):
        recipes = ["w4a4", "w4a4-rrs"]
        yield name, recipes.pop(number % 2)
        yield pytest.param(name, recipes[0], marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("name", "recipe"), [*((name, "w8a8") for name in TINY), *four_bits_in_turn()]
)
def test_quantizes_saves_loads_and_generates(
    name: str, recipe: str, float_checkpoint: Callable[[str], Path], data: Tensor, tmp_path: Path
) -> None:
    exact = original_logits(name, torch.float32)
    bound = 0.15 if recipe == "w8a8" else 0.9
    quantize(
        float_checkpoint(name),
        small(RECIPES[recipe]),
        data=data.clamp(max=90),
        output=tmp_path,
        check=bound > 0.5,  # exact, where the bound is a loose one
    )
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    logits = equivalence.logits(loaded, TOKENS)
    assert (logits - exact).norm() < bound * exact.norm()
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(equivalence.logits(again, TOKENS), logits)
    quantized = [m for m in again.modules() if isinstance(m, QuantizedLinear)]
    assert quantized
    prompt = TOKENS[:1, :5]
    text = again.generate(prompt, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert text.shape[1] > prompt.shape[1]
    stock = again.dequantize()
    assert not [m for m in stock.modules() if isinstance(m, QuantizedLinear)]
    assert [type(m) for m in stock.modules()] == [
        type(m) for m in tiny_model(name, torch.float32).modules()
    ]
    assert (equivalence.logits(stock, TOKENS) - exact).norm() < bound * exact.norm()


OWN_ATTENTION = {
    "gemma2": "caps its scores",
    "gpt_oss": "sinks",
    "bloom": "ALiBi",
    "bloom-untied": "ALiBi",
    "falcon-alibi": "ALiBi",
    "falcon": "does not let it be replaced",
    "falcon-groups": "does not let it be replaced",
}


@pytest.mark.parametrize("name", TINY)
def test_keys_and_values_are_quantized_or_refused_by_name(
    name: str, float_checkpoint: Callable[[str], Path], data: Tensor, tmp_path: Path
) -> None:
    recipe = preset("w8a8", "rtn").edit(kv_cache={"bits": 8})
    if name in OWN_ATTENTION:
        with pytest.raises(UnsupportedModelError, match=f"attention.*{OWN_ATTENTION[name]}"):
            make_plan(tiny_model(name), recipe)
        return
    quantize(float_checkpoint(name), recipe, output=tmp_path, check=False)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["recipe"]["kv_cache"] = None
    (tmp_path / "config.json").write_text(json.dumps(config))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)  # the same weights, a float cache
    logits, expected = equivalence.logits(loaded, TOKENS), equivalence.logits(plain, TOKENS)
    assert not torch.equal(logits, expected)
    assert (logits - expected).norm() < 0.15 * expected.norm()
    output = loaded.generate(
        TOKENS[:, :9],
        max_new_tokens=3,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
        return_dict_in_generate=True,
    )
    layers = output.past_key_values.layers
    assert all(isinstance(layer, QuantizedLayer) for layer in layers)
    assert output.sequences.shape == (2, 12)


class TestExperts:
    @pytest.mark.parametrize("name", WITH_EXPERTS)
    def test_each_expert_is_a_lane_of_its_own_and_the_router_stays_float(self, name: str) -> None:
        *_, graph = known_block(name)
        site = next(site for site in graph.sites if site.routed)
        assert (
            len([token_group for token_group in site.token_groups if "experts" in token_group[0]])
            == 4
        )
        assert {token_group for token_group in site.token_groups if len(token_group) > 1} <= {
            ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj")
        }
        assert site.float_readers
        assert len([s for s in graph.sites if s.stage == "down" and s.readers[0].routed]) == 4

    def test_an_expert_that_few_tokens_reach_is_rounded_to_nearest_and_reported(
        self, float_checkpoint, data, tmp_path, caplog
    ) -> None:
        recipe = RECIPES["w4a8"].edit(gptq__least_tokens=10_000, tuning=None)
        source = float_checkpoint("mixtral")
        quantize(source, recipe, data=data, output=tmp_path / "few", check=False)
        messages = [record.getMessage() for record in caplog.records]
        assert len([m for m in messages if "reached this expert" in m]) == 3 * 8
        caplog.clear()
        quantize(source, small(recipe), data=data, output=tmp_path / "enough", check=False)
        assert not [r for r in caplog.records if "reached this expert" in r.getMessage()]

    @pytest.mark.parametrize("name", [*WITH_EXPERTS, "opt"])
    def test_live_smoothing_is_refused_where_sequences_are_joined(self, name: str) -> None:
        with pytest.raises(RecipeError, match="live runtime smoothing needs whole sequences"):
            make_plan(tiny_model(name), RECIPES["w4a4-rrs-live"])

    def test_the_plan_says_that_experts_share_a_divisor(self) -> None:
        notes = make_plan(tiny_model("mixtral"), RECIPES["w8a8"]).notes
        assert any("share the smoothing divisor" in note for note in notes)


class TestOnlineRotation:
    @pytest.mark.parametrize("name", TINY)
    def test_every_family_has_a_rotated_mode(self, name: str) -> None:
        plan = make_plan(tiny_model(name), RECIPES["w4a8"])
        assert (plan.residual_rotation is None) == (name in POST_NORMS)
        for site in plan.sites:
            online = site.input.rotation is not None
            assert online == (
                site.site.reads == "mlp" or (name in POST_NORMS and site.site.reads == "residual")
            )

    def test_the_plan_says_where_no_divisor_passes(self) -> None:
        notes = make_plan(tiny_model("gpt2"), RECIPES["w4a8"]).notes
        assert any("no divisor passes the up_down edge" in note for note in notes)

    def test_the_plan_says_why_inputs_are_rotated_online(self) -> None:
        notes = make_plan(tiny_model("gemma2"), RECIPES["w4a8"]).notes
        assert any("rotated while the model runs" in note for note in notes)


REQUIRED = ["llama", "phi3", "gpt2", "bloom", "falcon", "mixtral"]


def shape_of(graph: BlockGraph, block: nn.Module) -> list[object]:
    """A graph without its site names: what reads what, who produces it, who writes the stream."""

    def matrices(refs: tuple[WeightRef, ...]) -> list[list[float]]:
        return [[*ref.view(block).flatten()[:3].tolist(), len(ref.view(block))] for ref in refs]

    sites = [
        (
            site.reads,
            sorted(matrices(site.readers)),
            sorted(matrices(site.float_readers)),
            (matrices(site.producer.refs), site.producer.heads)
            if isinstance(site.producer, Rows)
            else site.producer,
        )
        for site in graph.sites
    ]
    return [*sorted(sites, key=str), sorted(matrices(graph.residual_writers))]


@cache
def discovered(name: str) -> Family:
    return discover_family(TINY[name]())[0]


class TestInference:
    @pytest.mark.parametrize("name", TINY)
    def test_it_finds_what_the_file_says(self, name: str) -> None:
        model, written = opened(name)
        found = discovered(name)
        assert found.parts(model) == written.parts(model)
        for fact in ("centred", "flattens", "sums_at_entry"):
            assert getattr(found, fact) == getattr(written, fact)
        for (block, theirs), (_, ours) in zip(
            equivalence.graphs(model, found), equivalence.graphs(model, written), strict=True
        ):
            assert shape_of(theirs, block) == shape_of(ours, block)

    @pytest.mark.parametrize("name", REQUIRED)
    def test_what_it_finds_passes_the_same_transforms(self, name: str) -> None:
        found = discovered(name)
        model, written = opened(name)
        assert equivalence.claims(model, found).keys() == equivalence.claims(model, written).keys()
        for rewrite in (*equivalence.claims(model, found).values(), equivalence.everything):
            model, _ = opened(name)
            rewrite(model, found)
            now = equivalence.logits(model, TOKENS)
            assert (
                equivalence.deviation(now, original_logits(name))
                < equivalence.TOLERANCE[torch.float64]
            )

    @pytest.mark.parametrize(
        "name",
        [
            pytest.param(name, marks=() if name in ("phi3", "gpt2") else pytest.mark.slow)
            for name in REQUIRED
        ],
    )
    def test_a_family_without_its_file_is_quantized_with_a_notice(
        self, name, float_checkpoint, data, tmp_path, monkeypatch, caplog
    ) -> None:
        data = data.clamp(max=90)
        recipe = small(RECIPES["w4a8"]).edit(tuning=None)
        expected = quantize(float_checkpoint(name), recipe, data=data, check=False)
        model_type = TINY[name]().model_type
        monkeypatch.delitem(architectures._BY_MODEL_TYPE, model_type)
        made = quantize(
            float_checkpoint(name), recipe, data=data, output=tmp_path / "out", check=False
        ).load()
        notices = [r.getMessage() for r in caplog.records if "has no file" in r.getMessage()]
        assert notices
        assert f"'{model_type}'" in notices[0]
        assert torch.equal(equivalence.logits(made, TOKENS), equivalence.logits(expected, TOKENS))


STRAY = ("head_dim", "num_key_value_heads", "num_kv_heads", "kv_channels", "intermediate_size")
STRAY += ("n_inner", "ffn_dim", "ffn_hidden_size", "moe_intermediate_size", "num_local_experts")
STRAY += ("num_experts", "n_routed_experts")
stray_fields = st.dictionaries(
    st.sampled_from(STRAY), st.sampled_from([1, 2, 3, 4, 8, 32, 64]), max_size=4
)


def shapes(config: PretrainedConfig) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in empty_model(config).state_dict().items()}


def with_unused(config: PretrainedConfig, fields: dict[str, int]) -> PretrainedConfig:
    """A config with those of some fields that change no tensor of its model."""
    told, before = copy.deepcopy(config), shapes(config) if fields else {}
    for name, value in fields.items():
        tried = copy.deepcopy(told)
        try:
            setattr(tried.get_text_config(decoder=True), name, value)
            unused = shapes(tried) == before
        except Exception:  # a field that the model uses, in a way that this value does not fit
            unused = False
        told = tried if unused else told
    return told


@pytest.mark.parametrize("name", TINY)
class TestConfigFieldsThatAModelDoesNotUse:
    @settings(max_examples=5, deadline=None)
    @given(fields=stray_fields)
    def test_a_familys_file_goes_by_the_models_tensors(self, name, fields) -> None:
        told = with_unused(TINY[name](), fields).get_text_config(decoder=True)
        _, block, graph = known_block(name)
        assert family_named(name).graph(told, 0, block) == graph


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "bloom", "falcon", "mixtral"])
def test_fields_that_a_model_does_not_use_mislead_no_experiment(name: str) -> None:
    told = with_unused(TINY[name](), dict.fromkeys(STRAY, 2))
    _, block, graph = known_block(name)
    found, _ = discover_family(told)
    theirs = found.graph(told.get_text_config(decoder=True), 0, block)
    assert shape_of(theirs, block) == shape_of(graph, block)


def test_a_config_that_no_reading_makes_fit_its_model_is_refused_by_name() -> None:
    model, block, _ = first_block("phi3")
    config = copy.deepcopy(text_config(model))
    config.intermediate_size = 64
    with pytest.raises(UnsupportedModelError, match=r"block 0 is not what its config says: down"):
        family_named("phi3").graph(config, 0, block)


class TestRefusals:
    def test_an_unknown_type_that_inference_cannot_take_is_one_error(self) -> None:
        with pytest.raises(UnsupportedModelError, match="'clip' is no causal LM"):
            discover_family(CLIPConfig())

    def test_a_config_whose_wiring_a_familys_file_is_not_has_none(self) -> None:
        assert family_of(OPTConfig()) is not None
        assert family_of(OPTConfig(word_embed_proj_dim=512, do_layer_norm_before=False)) is None

    @pytest.mark.parametrize(
        ("method", "match"),
        [("fp8", "says that it is FP8, but no"), ("quanto", "already quantized.*'quanto'")],
    )
    def test_a_config_that_says_otherwise_than_the_tensors_is_refused(
        self, method, match, float_checkpoint, tmp_path
    ) -> None:
        source = tmp_path / "native"
        AutoModelForCausalLM.from_pretrained(float_checkpoint("llama")).save_pretrained(source)
        config = json.loads((source / "config.json").read_text())
        config["quantization_config"] = {"quant_method": method}
        (source / "config.json").write_text(json.dumps(config))
        with pytest.raises(SmoothqError, match=match):
            quantize(source, preset("w8a8", "rtn"), output=tmp_path / "out")
        assert not (tmp_path / "out").exists()


class TestWeightRef:
    def test_rows_are_a_view(self) -> None:
        block = nn.ModuleDict({"fused": nn.Linear(2, 4)}).requires_grad_(False)
        ref = WeightRef("fused.weight", rows=slice(1, None, 2))
        ref.view(block).fill_(7)
        ref.bias_view(block).fill_(8)
        assert (block["fused"].weight == 7).all(1).tolist() == [False, True, False, True]
        assert (block["fused"].bias == 8).tolist() == [False, True, False, True]

    def test_a_module_without_a_bias_has_none(self) -> None:
        block = nn.ModuleDict({"plain": nn.Linear(2, 4, bias=False)})
        assert WeightRef("plain.weight").bias_view(block) is None


class TestSite:
    reader, up = WeightRef("down.weight"), WeightRef("up.weight")

    @pytest.mark.parametrize(
        ("producer", "edge"),
        [
            (None, None),
            (Norm("norm.weight"), "norms"),
            (Rows((up,)), "up_down"),
            (Rows((up,), Heads(4, 2, 16)), "value_output"),
        ],
    )
    def test_the_edge_is_the_kind_of_the_producer(
        self, producer: Norm | Rows | None, edge: str | None
    ) -> None:
        assert Site("site", "mlp", (self.reader,), producer).edge == edge

    def test_modules_that_the_same_tokens_reach_share_a_lane(self) -> None:
        routed = tuple(WeightRef(f"experts.{i}.weight", routed=True) for i in range(2))
        shared = WeightRef("gate.weight"), WeightRef("up.weight")
        site = Site("both", "residual", (*shared, *routed), None)
        assert site.token_groups == (("gate", "up"), ("experts.0",), ("experts.1",))

    @pytest.mark.parametrize(
        ("old", "word"), [("stream", "residual"), ("values", "attention"), ("inner", "mlp")]
    )
    def test_an_earlier_word_for_what_it_reads_is_taken_with_a_warning(
        self, old: Any, word: str
    ) -> None:
        with pytest.warns(DeprecationWarning, match=f'now reads="{word}"') as warned:
            site = Site("site", old, (self.reader,), None)
        assert site.reads == word
        assert warned[0].filename == __file__

    def test_a_stream_takes_a_rotation_where_every_block_has_writers(self) -> None:
        site = Site("down", "mlp", (self.reader,), None)
        writes, norms = BlockGraph((site,), (self.reader,)), BlockGraph((site,), ())
        assert takes_rotation([writes])
        assert not takes_rotation([writes, norms])
        assert writes.value_output is None


def test_supported_types_are_listed_for_an_unknown_one() -> None:
    assert {"llama", "gpt_oss", "bloom"} <= set(supported_model_types())


class TestTable:
    def test_each_supported_type_has_a_row(self) -> None:
        rows = {row[0]: row[1:] for row in families.rows()}
        assert sorted(rows) == supported_model_types()
        assert rows["llama"] == (
            "norms, up→down, v→o",
            "offline",
            "up→down",
            RS_ALL,
            "yes",
            "none",
        )
        assert rows["opt"][1:3] == ("offline, mean kept", "up→down")
        assert rows["gemma2"][1] == "online, by site"
        assert rows["gpt_oss"][2:4] == ("none", "token, calibrated")
        assert rows["gpt_oss"][4] == rows["bloom"][4] == "no"


def test_a_family_from_outside_is_proven_or_refused(monkeypatch) -> None:
    config = GraniteConfig(num_hidden_layers=2, vocab_size=64)
    known = {**architectures._BY_MODEL_TYPE}
    monkeypatch.setattr("smoothq.architectures._BY_MODEL_TYPE", known)
    right = Family(("granite",), known["llama"].block)
    proven = prove_family(right, config)
    assert {"norm fusion", "stream rotation", "value rotation"} <= set(proven)
    assert max(proven.values()) <= 1e-9

    def swapped(config: PretrainedConfig, index: int) -> BlockGraph:
        qkv, o, gate_up, down = right.block(config, index).sites
        norms = (gate_up.producer, qkv.producer)
        sites = (replace(qkv, producer=norms[0]), o, replace(gate_up, producer=norms[1]), down)
        return BlockGraph(sites, right.block(config, index).residual_writers)

    with pytest.raises(UnsupportedModelError, match="wiring given for 'granite' is wrong: norm"):
        prove_family(Family(("granite",), swapped), config)
    register_family(right)
    assert family_of(config) is right
    with pytest.raises(ValueError, match="granite"):
        register_family(right)
