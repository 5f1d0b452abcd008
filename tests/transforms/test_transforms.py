"""What each transform does to the weights that it rewrites.

That every transform keeps every family's function is in `test_families.py`.
"""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from smoothq.architectures import (
    Edge,
    Heads,
    Norm,
    Rows,
    Site,
    WeightRef,
)
from smoothq.architectures.graph import is_tied
from smoothq.discovery import equivalence as equivalence
from smoothq.modules import rotate_ends, rotated_ends, stop_rotating
from smoothq.transforms.hadamard import Hadamard
from smoothq.transforms.norm_fusion import fuse_norm
from smoothq.transforms.rotation import rotate_residual, rotate_value_output
from smoothq.transforms.smoothing import repeat_over_queries, smooth, smoothing_divisor
from tests.architectures.test_families import (
    POST_NORMS,
    TOKENS,
    VISIBLE,
    family_named,
    opened,
    original_logits,
)
from tests.tiny_models import TINY, tiny_model

TIED = [name for name in TINY if name not in POST_NORMS and is_tied(tiny_model(name))]
WITH_NORMS = [name for name in TINY if name != "olmo2"]


def deviation(model: PreTrainedModel, name: str) -> float:
    return equivalence.deviation(equivalence.logits(model, TOKENS), original_logits(name))


def sites_of(
    model: PreTrainedModel, name: str, edge: Edge
) -> Iterator[tuple[int, nn.Module, Site]]:
    """Every site of the model with that kind of edge: its number, its block and itself."""
    wiring = equivalence.graphs(model, family_named(name))
    found = ((block, site) for block, graph in wiring for site in graph.sites)
    chosen = ((block, site) for block, site in found if site.edge == edge)
    return ((number, *pair) for number, pair in enumerate(chosen))


def width_of(block: nn.Module, site: Site) -> int:
    return site.readers[0].view(block).shape[1]


def random_maxima(width: int, seed: int) -> Tensor:
    """Positive and of different sizes: most of them between 0.02 and 50."""
    generator = torch.Generator().manual_seed(seed)
    return torch.exp(2 * torch.randn(width, generator=generator, dtype=torch.float64))


class TestNormFusion:
    @pytest.mark.parametrize("name", WITH_NORMS)
    def test_fused_norms_multiply_by_one_and_add_nothing(self, name: str) -> None:
        model, family = opened(name)
        equivalence.fuse(model, family)
        for _, block, site in sites_of(model, name, "norms"):
            weight = block.get_parameter(site.producer.weight) + site.producer.offset
            assert torch.equal(weight, torch.ones_like(weight))
            bias = site.producer.bias_view(block)
            assert bias is None or not bias.any()

    def test_a_linear_without_a_bias_gets_one_for_that_of_the_norm(self) -> None:
        block = nn.ModuleDict(
            {"norm": nn.LayerNorm(4), "linear": nn.Linear(4, 3, bias=False)}
        ).double()
        block.requires_grad_(False)
        block["norm"].bias.copy_(column(1, -2, 3, 0.5))
        x = torch.randn(5, 4, dtype=torch.float64)
        expected = block["linear"](block["norm"](x))
        fuse_norm(block, Norm("norm.weight"), (WeightRef("linear.weight"),))
        assert block["linear"].bias.shape == (3,)
        assert not block["norm"].bias.any()
        torch.testing.assert_close(block["linear"](block["norm"](x)), expected)


class TestRotation:
    @pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "mixtral"])
    def test_the_inverse_returns_the_weights(self, name: str) -> None:
        model, family = opened(name)
        rotation = Hadamard.of(TINY[name]().hidden_size, seed=3)
        for block, graph in equivalence.graphs(model, family):
            before = {n: parameter.clone() for n, parameter in block.named_parameters()}
            rotate_residual(block, graph, rotation)
            assert any(not torch.equal(now, before[n]) for n, now in block.named_parameters())
            rotate_residual(block, graph, rotation, inverse=True)
            for n, now in block.named_parameters():
                torch.testing.assert_close(now, before[n], rtol=0, atol=1e-13)

    def test_readers_turn_with_r_and_writers_with_its_transpose(self) -> None:
        model, family = opened("llama-untied")
        block, graph = next(equivalence.graphs(model, family))
        rotation = Hadamard.of(48, seed=3)
        q, down = (
            block.get_parameter(f"{n}.weight") for n in ("self_attn.q_proj", "mlp.down_proj")
        )
        bias, r = block.mlp.down_proj.bias, rotation.matrix()
        expected = q @ r, r.T @ down, bias @ r
        rotate_residual(block, graph, rotation)
        torch.testing.assert_close((q.data, down.data, bias.data), expected)

    def test_only_attention_values_are_rotated_per_head(self) -> None:
        _, block, site = next(sites_of(opened("llama")[0], "llama", "up_down"))
        with pytest.raises(ValueError, match="'down' does not read attention values"):
            rotate_value_output(block, site, Hadamard.of(16, seed=None))


class TestRotatedEnds:
    @pytest.mark.parametrize("name", TIED)
    def test_the_tie_stays(self, name: str) -> None:
        model, family = opened(name)
        equivalence.rotate_stream(model, family)
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight

    @pytest.mark.parametrize("name", TIED)
    def test_stop_rotating_undoes_it(self, name: str) -> None:
        model = tiny_model(name)
        parts = family_named(name).parts(model)
        names, classes = list(model.state_dict()), [type(module) for module in model.modules()]
        modules, logits = list(model.modules()), model(TOKENS).logits
        rotation = Hadamard.of(model.config.hidden_size, seed=5)
        rotate_ends(model, parts, rotation)
        assert list(model.state_dict()) == names
        ends = {model.get_submodule(name) for name in (parts.block_name(0), parts.final_norm)}
        assert {module for module, _ in rotated_ends(model)} == ends
        assert not torch.equal(model(TOKENS).logits, logits)
        stop_rotating(model)
        assert list(model.modules()) == modules
        assert [type(module) for module in model.modules()] == classes
        assert list(model.state_dict()) == names
        assert torch.equal(model(TOKENS).logits, logits)


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def norm_and_readers() -> tuple[nn.ModuleDict, Site]:
    """A norm with one reader and one float reader; their largest weights are −4, 1 and −9."""
    block = nn.ModuleDict(
        {
            "norm": nn.RMSNorm(3, dtype=torch.float64),
            "linear": nn.Linear(3, 2, bias=False, dtype=torch.float64),
            "router": nn.Linear(3, 1, bias=False, dtype=torch.float64),
        }
    ).requires_grad_(False)
    block["norm"].weight.copy_(column(3, 5, -7))
    block["linear"].weight.copy_(torch.stack([column(1, -0.5, 3), column(-4, 1, 2)]))
    block["router"].weight.copy_(column(2, 0.25, -9))
    reader, router = WeightRef("linear.weight"), WeightRef("router.weight")
    return block, Site("site", "residual", (reader,), Norm("norm.weight"), (router,))


class TestSmoothing:
    def test_the_largest_magnitude_over_all_readers_counts(self) -> None:
        block, site = norm_and_readers()
        smooth(block, site, column(16, 4, 9), alpha=0.5)  # s = √(16 / 4), √(4 / 1), √(9 / 9)
        expected = torch.stack([column(2, -1, 3), column(-8, 2, 2)])
        torch.testing.assert_close(block["linear"].weight.data, expected)
        torch.testing.assert_close(block["router"].weight.data[0], column(4, 0.5, -9))
        torch.testing.assert_close(block["norm"].weight.data, column(1.5, 2.5, -7))

    @pytest.mark.parametrize(
        ("alpha", "expected"),
        [
            (0.0, (1 / 4, 1 / 2)),
            (0.25, (2 / 4**0.75, 3 / 2**0.75)),
            (0.5, (4 / 2, 9 / 2**0.5)),
            (1.0, (16, 81)),
        ],
    )
    def test_alpha_shares_between_input_and_weight(
        self, alpha: float, expected: tuple[float, ...]
    ) -> None:
        divisor = smoothing_divisor(column(16, 81), column(4, 2), alpha)
        torch.testing.assert_close(divisor, column(*expected))

    @pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
    def test_a_dead_channel_is_left_alone(self, alpha: float) -> None:
        assert torch.equal(
            smoothing_divisor(column(0, 3, 0), column(2, 0, 0), alpha), torch.ones(3)
        )

    def test_a_divisor_is_at_least_1e_5(self) -> None:
        divisor = smoothing_divisor(column(1e-12, 1e-12, 4e-10), column(100, 1, 1), 0.5)
        torch.testing.assert_close(divisor, column(1e-5, 1e-5, 2e-5), rtol=1e-12, atol=0)

    def test_query_heads_of_a_value_head_share_its_divisor(self) -> None:
        model, _ = opened("llama-untied")
        _, block, site = next(sites_of(model, "llama-untied", "value_output"))
        o, v = block.self_attn.o_proj.weight, block.self_attn.v_proj
        before = o.clone(), v.weight.clone(), v.bias.clone()
        maxima = random_maxima(64, seed=0)
        smooth(block, site, maxima, alpha=0.5)
        shared = smoothing_divisor(
            maxima.view(2, 2, 16).amax(1).flatten(),
            before[0].abs().amax(0).view(2, 2, 16).amax(1).flatten(),
            0.5,
        )
        per_query = shared.view(2, 1, 16).expand(2, 2, 16).flatten()
        assert torch.equal(repeat_over_queries(shared, Heads(4, 2, 16)), per_query)
        torch.testing.assert_close(o.data, before[0] * per_query)
        torch.testing.assert_close(v.weight.data, before[1] / shared[:, None])
        torch.testing.assert_close(v.bias.data, before[2] / shared)

    def test_a_divisor_is_dealt_out_over_the_rows_of_several_refs(self) -> None:
        block = nn.ModuleDict({"up": nn.Linear(2, 6), "down": nn.Linear(4, 1)}).double()
        block.requires_grad_(False)
        refs = tuple(WeightRef("up.weight", slice(i, i + 2)) for i in (1, 4))
        before, readers = block["up"].weight.clone(), block["down"].weight.clone()
        site = Site("down", "mlp", (WeightRef("down.weight"),), Rows(refs))
        smooth(block, site, column(1, 4, 9, 16), alpha=1.0)
        divisor = column(1, 1, 4, 1, 9, 16)
        torch.testing.assert_close(block["up"].weight.data, before / divisor[:, None])
        torch.testing.assert_close(block["down"].weight.data, readers * column(1, 4, 9, 16))

    def test_a_site_without_producer_is_refused(self) -> None:
        block, site = norm_and_readers()
        with pytest.raises(ValueError, match="'alone' has no producer"):
            smooth(block, Site("alone", "mlp", site.readers, None), column(1, 2, 3), alpha=0.5)


def store_norms(model: PreTrainedModel, name: str, dtype: torch.dtype) -> None:
    """Round the norms that smoothing has divided, as storing them would."""
    for _, block, site in sites_of(model, name, "norms"):
        weight = block.get_parameter(site.producer.weight)
        weight.copy_(weight.to(dtype))


def smooth_norms_for(model: PreTrainedModel, name: str, dtype: torch.dtype) -> None:
    for number, block, site in sites_of(model, name, "norms"):
        maxima = random_maxima(width_of(block, site), seed=number)
        smooth(block, site, maxima, alpha=0.5, norm_dtype=dtype)


class TestStoredNorms:
    @pytest.mark.parametrize("fused", [False, True], ids=["norms-as-they-are", "norms-fused"])
    @pytest.mark.parametrize("name", ["llama", "gemma2", "cohere", "mixtral"])
    def test_rounding_a_smoothed_norm_keeps_the_function(self, name: str, fused: bool) -> None:
        model, family = opened(name)
        if fused:
            equivalence.fuse(model, family)
        smooth_norms_for(model, name, torch.bfloat16)
        store_norms(model, name, torch.bfloat16)
        assert deviation(model, name) < equivalence.TOLERANCE[torch.float64]

    def test_rounding_is_seen_where_smoothing_did_not_know_of_it(self) -> None:
        model, family = opened("llama")
        equivalence.smoothing("norms")(model, family)
        store_norms(model, "llama", torch.bfloat16)
        assert deviation(model, "llama") > VISIBLE

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_a_divisor_that_the_stored_norm_cannot_hold_still_cancels(
        self, dtype: torch.dtype
    ) -> None:
        block, site = norm_and_readers()
        products = [block["norm"].weight * block[n].weight for n in ("linear", "router")]
        smooth(block, site, column(1e-20, 4, 1e20), alpha=0.5, norm_dtype=dtype)
        block["norm"].weight.copy_(block["norm"].weight.to(dtype))
        now = [block["norm"].weight * block[n].weight for n in ("linear", "router")]
        torch.testing.assert_close(now, products, rtol=1e-12, atol=0)
