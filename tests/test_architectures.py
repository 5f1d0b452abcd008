"""Every graph names the weights of the real modules: all of them, in order, as views."""

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from smoothq.architectures import (
    BlockGraph,
    Heads,
    Norm,
    Rows,
    Site,
    WeightRef,
    family_of,
    supported_model_types,
)
from smoothq.errors import UnsupportedModelError
from tests.architectures import TINY, VOCABULARY, tiny_model

LINEAR_FAMILIES = [name for name in TINY if name != "mixtral"]
HEADS = {
    "llama": Heads(4, 2, 16),
    "llama-untied": Heads(4, 2, 16),
    "mistral": Heads(6, 2, 16),
    "qwen2": Heads(6, 2, 16),
    "qwen3": Heads(4, 2, 16),
    "phi3": Heads(6, 2, 16),
    "mixtral": Heads(6, 2, 16),
}


def first_block(name: str) -> tuple[PreTrainedModel, nn.Module, BlockGraph]:
    model = tiny_model(name)
    family = family_of(model.config)
    return model, model.get_submodule(family.layers)[0], family.block(model.config, 0)


def all_refs(graph: BlockGraph) -> list[WeightRef]:
    """Every weight that reads a site, each once: together these are all the matrices of a block."""
    return [reader for site in graph.sites for reader in site.all_readers]


@pytest.mark.parametrize("name", TINY)
class TestEveryFamily:
    def test_readers_share_the_width_of_their_site(self, name: str) -> None:
        model, block, graph = first_block(name)
        widths = {"qkv": model.config.hidden_size, "gate_up": model.config.hidden_size}
        widths |= {"o": HEADS[name].query * HEADS[name].dim}
        for site in graph.sites:
            expected = widths.get(site.name, model.config.intermediate_size)
            assert {reader.view(block).shape[1] for reader in site.all_readers} == {expected}

    def test_producers_fit_the_width_of_their_site(self, name: str) -> None:
        _, block, graph = first_block(name)
        for site in graph.sites:
            width = site.readers[0].view(block).shape[1]
            if isinstance(site.producer, Norm):
                assert block.get_parameter(site.producer.weight).shape == (width,)
            else:
                heads = site.producer.heads
                rows = width if heads is None else heads.key_value * heads.dim
                assert site.producer.ref.view(block).shape[0] == rows
                assert site.producer.ref in all_refs(graph)

    def test_residual_writers_write_the_hidden_size(self, name: str) -> None:
        model, block, graph = first_block(name)
        for writer in graph.residual_writers:
            assert writer.view(block).shape[0] == model.config.hidden_size
            assert writer in all_refs(graph)

    def test_biases_have_a_value_for_every_row(self, name: str) -> None:
        _, block, graph = first_block(name)
        for ref in all_refs(graph):
            bias = ref.bias_view(block)
            assert (bias is None) == (ref.bias is None)
            assert bias is None or bias.shape == ref.view(block).shape[:1]

    def test_readers_cover_every_weight_and_bias_exactly_once(self, name: str) -> None:
        _, block, graph = first_block(name)
        linear = {n: p.zero_() for n, p in block.named_parameters() if "norm" not in n}
        for ref in all_refs(graph):
            ref.view(block).add_(1)
            if (bias := ref.bias_view(block)) is not None:
                bias.add_(1)
        for parameter in linear.values():
            assert torch.equal(parameter, torch.ones_like(parameter))

    def test_every_norm_of_the_residual_stream_is_a_producer(self, name: str) -> None:
        _, block, graph = first_block(name)
        norms = [n for n, _ in block.named_parameters() if n.endswith("layernorm.weight")]
        named = [s.producer.weight for s in graph.sites if isinstance(s.producer, Norm)]
        assert named == norms
        assert len(named) == 2

    def test_views_share_memory_with_the_parameter(self, name: str) -> None:
        _, block, graph = first_block(name)
        for ref in all_refs(graph):
            parameter = block.get_parameter(ref.tensor)
            before = parameter.clone()
            ref.view(block).neg_()
            assert not torch.equal(parameter, before)
            ref.view(block).neg_()
            assert torch.equal(parameter, before)

    def test_edges_follow_from_the_producers(self, name: str) -> None:
        *_, graph = first_block(name)
        downs = 4 if name == "mixtral" else 1
        edges = [site.edge for site in graph.sites]
        assert edges == ["norms", "value_output", "norms", *["up_down"] * downs]
        assert graph.value_output is graph.sites[1]

    def test_heads_come_from_the_config(self, name: str) -> None:
        *_, graph = first_block(name)
        assert graph.value_output.producer.heads == HEADS[name]

    def test_module_names_of_the_family_exist(self, name: str) -> None:
        model, _, _ = first_block(name)
        family = family_of(model.config)
        assert model.get_submodule(family.base) is model.base_model
        assert model.get_submodule(family.embedding) is model.get_input_embeddings()
        assert model.get_submodule(family.head) is model.get_output_embeddings()
        assert len(model.get_submodule(family.layers)) == model.config.num_hidden_layers
        assert model.get_submodule(family.final_norm).weight.shape == (model.config.hidden_size,)


class TestExecution:
    @pytest.mark.parametrize("name", LINEAR_FAMILIES)
    def test_sites_come_in_the_order_of_execution_and_their_readers_read_one_tensor(
        self, name: str
    ) -> None:
        model, block, graph = first_block(name)
        calls: list[tuple[str, Tensor]] = []
        for site in graph.sites:
            for module in site.modules:
                block.get_submodule(module).register_forward_pre_hook(
                    lambda _, inputs, module=module: calls.append((module, inputs[0]))
                )
        model(torch.arange(VOCABULARY)[None, :24])
        assert [n for n, _ in calls] == [n for site in graph.sites for n in site.modules]
        inputs = dict(calls)
        for site in graph.sites:
            assert len({id(inputs[module]) for module in site.modules}) == 1

    @pytest.mark.parametrize("name", LINEAR_FAMILIES)
    def test_a_norm_that_produces_a_site_puts_out_its_input(self, name: str) -> None:
        model, block, graph = first_block(name)
        seen: dict[str, Tensor] = {}
        sites = [site for site in graph.sites if isinstance(site.producer, Norm)]
        for site in sites:
            norm = site.producer.weight.rpartition(".")[0]
            block.get_submodule(norm).register_forward_hook(
                lambda _, inputs, output, norm=norm: seen.update({norm: output})
            )
            block.get_submodule(site.modules[0]).register_forward_pre_hook(
                lambda _, inputs, module=site.modules[0]: seen.update({module: inputs[0]})
            )
        model(torch.arange(VOCABULARY)[None, :24])
        for site in sites:
            assert seen[site.modules[0]] is seen[site.producer.weight.rpartition(".")[0]]

    def test_a_fused_linear_is_one_module_of_its_site(self) -> None:
        *_, graph = first_block("phi3")
        assert [site.modules for site in graph.sites] == [
            ("self_attn.qkv_proj",),
            ("self_attn.o_proj",),
            ("mlp.gate_up_proj",),
            ("mlp.down_proj",),
        ]


class TestWeightRef:
    def test_a_transposed_weight_is_seen_as_out_by_in_features(self) -> None:
        block = nn.ModuleDict({"fused": Conv1D(6, 4)}).requires_grad_(False)
        ref = WeightRef("fused.weight", "fused.bias", rows=(2, 5), transposed=True)
        assert torch.equal(ref.view(block), block["fused"].weight[:, 2:5].t())
        assert ref.module == "fused"
        ref.view(block).fill_(7)
        ref.bias_view(block).fill_(8)
        assert (block["fused"].weight == 7).all(0).tolist() == [False] * 2 + [True] * 3 + [False]
        assert (block["fused"].bias == 8).tolist() == [False] * 2 + [True] * 3 + [False]

    def test_rows_of_an_expert_are_a_view_of_its_slice(self) -> None:
        block = nn.ParameterDict({"experts": torch.zeros(3, 4, 2), "biases": torch.zeros(3, 4)})
        block.requires_grad_(False)
        ref = WeightRef("experts", "biases", rows=(2, 4), expert=1)
        ref.view(block).fill_(1)
        ref.bias_view(block).fill_(1)
        assert block["experts"].sum(2).tolist() == [[0] * 4, [0, 0, 2, 2], [0] * 4]
        assert block["biases"].tolist() == [[0] * 4, [0, 0, 1, 1], [0] * 4]


class TestSite:
    reader, up = WeightRef("down.weight"), WeightRef("up.weight")

    @pytest.mark.parametrize(
        ("producer", "edge"),
        [
            (None, None),
            (Norm("norm.weight"), "norms"),
            (Rows(up), "up_down"),
            (Rows(up, Heads(4, 2, 16)), "value_output"),
        ],
    )
    def test_the_edge_is_the_kind_of_the_producer(
        self, producer: Norm | Rows | None, edge: str | None
    ) -> None:
        assert Site("site", (self.reader,), producer).edge == edge

    def test_a_block_without_foldable_values_has_no_value_output(self) -> None:
        sites = (Site("o", (self.reader,), None), Site("down", (self.reader,), Rows(self.up)))
        assert BlockGraph(sites, (self.reader,)).value_output is None


class TestFamilyOf:
    def test_an_unknown_model_type_is_refused_with_the_list_of_supported_ones(self) -> None:
        with pytest.raises(UnsupportedModelError) as refusal:
            family_of(GPT2Config())
        assert str(refusal.value) == (
            "architecture 'gpt2' is not supported; supported: llama, mistral, phi3, qwen2, qwen3"
        )

    def test_what_cannot_be_quantized_is_known_but_not_listed(self) -> None:
        family = family_of(TINY["mixtral"]())
        assert "3-D parameters" in family.unquantizable
        assert "mixtral" not in supported_model_types()
