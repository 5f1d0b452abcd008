"""Discovery claims what it has proven, of any decoder, and lets the rest alone."""

from functools import cache
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from smoothq.architectures import BlockGraph, Family, Norm, Rows
from smoothq.architectures.graph import takes_rotation, text_config
from smoothq.architectures.linearize import linearize_block
from smoothq.checkpoint.skeleton import empty_model
from smoothq.discovery import equivalence
from smoothq.discovery.claims import Proof
from smoothq.discovery.findings import Findings
from smoothq.discovery.infer import discover_family, example
from smoothq.discovery.shrink import tiny_configs
from smoothq.discovery.stack import find_stack, kinds_of
from smoothq.discovery.weight_watch import read_weights
from smoothq.errors import UnsupportedModelError

TOKENS = torch.randint(60, (2, 17), generator=torch.Generator().manual_seed(9))

# Small models of the forms that people quantize: linear attention beside attention, latent
# attention, short convolutions, state spaces, experts of several forms.
SMALL: dict[str, dict[str, Any]] = {
    "qwen3_next": {"num_hidden_layers": 4, "num_experts": 4, "hidden_size": 64},
    "deepseek_v3": {"num_hidden_layers": 4, "n_routed_experts": 8, "n_group": 2, "topk_group": 1},
    "lfm2": {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]},
    "bamba": {"num_hidden_layers": 3, "attn_layer_indices": [1]},
    "granitemoehybrid": {
        "num_hidden_layers": 2,
        "layer_types": ["mamba", "attention"],
        "num_local_experts": 4,
    },
    "nemotron_h": {"hybrid_override_pattern": "M*E-"},
    "llama4_text": {"num_hidden_layers": 4, "num_local_experts": 4},
    "mamba2": {"num_hidden_layers": 2},
    "falcon_h1": {"num_hidden_layers": 2},
    "jamba": {
        "num_hidden_layers": 4,
        "attn_layer_period": 4,
        "attn_layer_offset": 1,
        "num_experts": 4,
    },
}
# Norms behind attention: experts read the stream itself.
OTHERS: dict[str, dict[str, Any]] = {"flex_olmo": {"num_hidden_layers": 2, "num_experts": 4}}


@cache
def finding(name: str) -> tuple[PreTrainedModel, Family]:
    """The real model's skeleton, and its discovered family."""
    config = AutoConfig.for_model(name, **(SMALL | OTHERS)[name])
    return empty_model(config), discover_family(config)[0]


def graphs(name: str) -> list[tuple[nn.Module, BlockGraph]]:
    """Each block of the real model, linearized, with its graph."""
    model, family = finding(name)
    blocks = model.get_submodule(family.parts(model).layers)
    for block in blocks.children():
        linearize_block(block)
    config = text_config(model)
    return [(b, family.graph(config, index, b)) for index, b in enumerate(blocks.children())]


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
class TestEveryForm:
    def test_norms_take_divisors_and_the_stream_a_rotation(self, name: str) -> None:
        wiring = [graph for _, graph in graphs(name)]
        assert takes_rotation(wiring)
        assert all(
            any(isinstance(s.producer, Norm) and s.reads == "residual" for s in graph.sites)
            for graph in wiring
        )

    def test_each_linear_belongs_to_one_site(self, name: str) -> None:
        for block, graph in graphs(name):
            modules = [reader.module for site in graph.sites for reader in site.all_readers]
            assert len(modules) == len(set(modules))
            linears = {n for n, m in block.named_modules() if isinstance(m, nn.Linear)}
            assert linears <= set(modules)

    def test_every_claim_leaves_the_logits_of_other_tokens(self, name: str) -> None:
        model, family = finding(name)
        tiny = example(model.config, kinds_of(empty_model(model.config)))
        changes = Proof(tiny, family, read_weights(tiny, TOKENS), TOKENS).changes()
        assert max(changes.values()) < equivalence.TOLERANCE[torch.float64]


@pytest.mark.slow
def test_a_claim_that_fails_is_left_out_and_the_rest_stands() -> None:
    _, family = finding("qwen3_next")
    assert any("value rotation does not hold at o" in note for note in family.notes)
    gated = [site for _, graph in graphs("qwen3_next") for site in graph.sites if site.heads]
    assert gated
    assert all(isinstance(s.producer, Rows) and not s.turns_values for s in gated)


@pytest.mark.slow
def test_modules_that_read_multiples_of_an_input_are_observed_each() -> None:
    _, graph = graphs("falcon_h1")[0]
    attention = tuple(f"self_attn.{part}_proj" for part in "qkv")
    assert graph.sites[0].token_groups == (("mamba.in_proj",), attention)


@pytest.mark.slow
def test_experts_that_read_no_norm_still_fold_divisors_into_up() -> None:
    _, family = finding("flex_olmo")
    assert not family.notes
    for _, graph in graphs("flex_olmo"):
        assert any(site.routed and site.edge == "up_down" for site in graph.sites)
        assert all(site.edge != "norms" for site in graph.sites)


@pytest.mark.slow
def test_where_no_small_model_runs_every_linear_is_a_site_of_its_own(monkeypatch) -> None:
    config = AutoConfig.for_model("lfm2", **SMALL["lfm2"], vocab_size=99)
    monkeypatch.setattr("smoothq.discovery.infer.LARGEST", 0)
    family, _ = discover_family(config)
    assert "every linear is a site of its own" in family.notes[0]
    block = empty_model(config).get_decoder().layers[0]
    graph = family.graph(config, 0, block)
    assert [len(site.readers) for site in graph.sites] == [1] * len(graph.sites)
    assert not graph.residual_writers
    assert all(site.producer is None for site in graph.sites)


def test_nothing_is_claimed_of_plain_findings() -> None:
    block = nn.ModuleDict({"up": nn.Linear(4, 8), "act": nn.ReLU(), "down": nn.Linear(8, 4)})
    plain = Findings.plain(block)
    assert [site.modules for site in plain.sites] == [["up"], ["down"]]
    assert not plain.writes_stream
    assert "residual_writers=()" in plain.body(rotatable=True)


class TestTinyConfigs:
    @pytest.mark.parametrize(
        "name", ["qwen2_vl", "glm4_moe", "deepseek_v2", "gemma3n_text", "minimax_m2", "jamba"]
    )
    def test_the_smallest_has_few_layers_and_a_small_vocabulary(self, name: str) -> None:
        config = AutoConfig.for_model(name)
        tiny = next(iter(tiny_configs(config, 2))).get_text_config(decoder=True)
        assert (tiny.num_hidden_layers, tiny.vocab_size) == (2, 64)
        assert tiny.hidden_size < config.get_text_config(decoder=True).hidden_size

    def test_lists_by_layer_are_cut(self) -> None:
        config = AutoConfig.for_model("gemma3n_text")
        layers = config.num_hidden_layers
        tiny = next(iter(tiny_configs(config, 3)))
        for name, value in vars(config).items():
            if isinstance(value, list) and len(value) == layers:
                assert len(getattr(tiny, name)) == 3, name

    def test_rotary_sections_fill_the_head_that_is_left(self) -> None:
        config = AutoConfig.for_model("qwen2_vl").get_text_config(decoder=True)
        config.rope_parameters = {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [16, 24, 24],
        }
        tiny = next(iter(tiny_configs(config, 2)))
        assert sum(tiny.rope_parameters["mrope_section"]) == 8

    def test_the_config_itself_is_not_changed(self) -> None:
        config = AutoConfig.for_model("qwen3_next")
        before = config.to_json_string(use_diff=False)
        list(tiny_configs(config, 2))
        assert config.to_json_string(use_diff=False) == before


class TestStack:
    @pytest.mark.parametrize(
        ("name", "stack", "count"),
        [
            ("llama4", "layers", 48),
            ("modernbert-decoder", "layers", 22),
            ("cpmant", "encoder.layers", 48),
            ("longcat_flash", "layers", 28),
        ],
    )
    def test_it_is_found_wherever_it_hangs(self, name: str, stack: str, count: int) -> None:
        path, blocks = find_stack(empty_model(AutoConfig.for_model(name)))
        assert path.endswith(stack)
        assert len(blocks) == count

    def test_a_model_without_one_is_refused(self) -> None:
        class Nothing(PreTrainedModel):
            config_class = PretrainedConfig

            def __init__(self) -> None:
                super().__init__(PretrainedConfig())
                self.only = nn.Linear(2, 2)

            def get_decoder(self) -> nn.Module:
                return self

        with pytest.raises(UnsupportedModelError, match="no list of blocks"):
            find_stack(Nothing())
