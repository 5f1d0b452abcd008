"""Every transform keeps every family's function: the rewritten model's logits are the original's.

In float64 the stock norms are replaced by twins, since they compute in float32 even in a float64
model; the stock modules are checked in float32.
"""

from collections.abc import Callable, Iterator
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from smoothq.architectures import BlockGraph, Edge, Heads, Norm, Site, WeightRef, family_of
from smoothq.modules import rotate_ends, stop_rotating
from smoothq.transforms.hadamard import Hadamard
from smoothq.transforms.norm_fusion import fuse_norm, fuse_norms
from smoothq.transforms.rotation import rotate_input, rotate_residual, rotate_value_output
from smoothq.transforms.smoothing import repeat_over_queries, smooth, smoothing_divisor
from tests.architectures import TINY, VOCABULARY, tiny_model

Rewrite = Callable[[PreTrainedModel], None]

TOKENS = torch.randint(VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(1))
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}
VISIBLE = 1e-3  # a change of the logits that no rounding explains

TIED = [name for name in TINY if TINY[name]().tie_word_embeddings]
UNTIED = [name for name in TINY if name not in TIED]
# The input of an expert's down_proj is the input of no module that a hook could rotate.
HOOKABLE = [name for name in TINY if name != "mixtral"]


class Float64RMSNorm(nn.Module):
    """A stock RMSNorm's twin, with its weight, that computes in the dtype of its input."""

    def __init__(self, stock: nn.Module) -> None:
        super().__init__()
        self.weight, self.eps = stock.weight, stock.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps))


def model_of(name: str, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """A tiny model as it is tested: with twins of its norms in float64, as it comes in float32."""
    model = tiny_model(name, dtype)
    if dtype == torch.float64:
        stock = [
            n for n, module in model.named_modules() if type(module).__name__[-7:] == "RMSNorm"
        ]
        for norm in stock:
            model.set_submodule(norm, Float64RMSNorm(model.get_submodule(norm)))
    return model


@cache
def original_logits(name: str, dtype: torch.dtype = torch.float64) -> Tensor:
    return model_of(name, dtype)(TOKENS).logits


def deviation(model: PreTrainedModel, name: str, dtype: torch.dtype = torch.float64) -> float:
    """The largest change of a logit, relative to the largest logit."""
    expected = original_logits(name, dtype)
    return float((model(TOKENS).logits - expected).abs().max() / expected.abs().max())


def graphs(model: PreTrainedModel) -> Iterator[tuple[nn.Module, BlockGraph]]:
    family = family_of(model.config)
    for index, block in enumerate(model.get_submodule(family.layers)):
        yield block, family.block(model.config, index)


def sites_of(model: PreTrainedModel, edge: Edge) -> Iterator[tuple[int, nn.Module, Site]]:
    """Every site of the model with that kind of edge: its number, its block and itself."""
    found = ((block, site) for block, graph in graphs(model) for site in graph.sites)
    chosen = ((block, site) for block, site in found if site.edge == edge)
    return ((number, *pair) for number, pair in enumerate(chosen))


def width_of(block: nn.Module, site: Site) -> int:
    return site.readers[0].view(block).shape[1]


def random_maxima(width: int, seed: int) -> Tensor:
    """Positive and of different sizes: most of them between 0.02 and 50."""
    generator = torch.Generator().manual_seed(seed)
    return torch.exp(2 * torch.randn(width, generator=generator, dtype=torch.float64))


def fuse_block_norms(model: PreTrainedModel) -> None:
    for block, graph in graphs(model):
        fuse_norms(block, graph)


def fuse_final_norm(model: PreTrainedModel) -> None:
    fuse_norm(model, Norm("model.norm.weight"), (WeightRef("lm_head.weight"),))


def rotate_blocks(model: PreTrainedModel) -> Hadamard:
    rotation = Hadamard.of(model.config.hidden_size, seed=5)
    for block, graph in graphs(model):
        rotate_residual(block, graph, rotation)
    return rotation


def rotate_stream_folded(model: PreTrainedModel) -> None:
    fuse_block_norms(model)
    fuse_final_norm(model)
    rotation = rotate_blocks(model)
    rotate_input(model.lm_head.weight, rotation)
    rotate_input(model.model.embed_tokens.weight, rotation)


def rotate_stream_online(model: PreTrainedModel) -> None:
    fuse_block_norms(model)
    rotate_ends(model.model.embed_tokens, model.model.norm, rotate_blocks(model))


def rotate_values(model: PreTrainedModel) -> None:
    for number, block, site in sites_of(model, "value_output"):
        rotate_value_output(block, site, Hadamard.of(16, seed=number))


def smooth_edge(model: PreTrainedModel, edge: Edge) -> None:
    for number, block, site in sites_of(model, edge):
        smooth(block, site, random_maxima(width_of(block, site), seed=number), alpha=0.5)


def smooth_norms(model: PreTrainedModel) -> None:
    smooth_edge(model, "norms")


def smooth_up_down(model: PreTrainedModel) -> None:
    smooth_edge(model, "up_down")


def smooth_value_output(model: PreTrainedModel) -> None:
    smooth_edge(model, "value_output")


def rotate_down_weights(model: PreTrainedModel) -> None:
    for number, block, site in sites_of(model, "up_down"):
        rotate_input(site.readers[0].view(block), Hadamard.of(width_of(block, site), seed=number))


def rotate_down(model: PreTrainedModel) -> None:
    rotate_down_weights(model)
    for number, block, site in sites_of(model, "up_down"):
        rotation = Hadamard.of(width_of(block, site), seed=number)
        block.get_submodule(site.readers[0].module).register_forward_pre_hook(
            lambda _, inputs, rotation=rotation: (rotation.apply(inputs[0]),)
        )


def everything(model: PreTrainedModel) -> None:
    """All of them in the pipeline's order."""
    if model.config.tie_word_embeddings:
        rotate_stream_online(model)
    else:
        rotate_stream_folded(model)
    smooth_up_down(model)
    smooth_value_output(model)
    smooth_norms(model)
    rotate_values(model)
    if model.config.model_type != "mixtral":
        rotate_down(model)


REWRITES: dict[Rewrite, list[str]] = {
    fuse_block_norms: list(TINY),
    fuse_final_norm: UNTIED,
    rotate_stream_folded: UNTIED,
    rotate_stream_online: TIED,
    rotate_values: list(TINY),
    smooth_norms: list(TINY),
    smooth_up_down: list(TINY),
    smooth_value_output: list(TINY),
    rotate_down: HOOKABLE,
    everything: list(TINY),
}
CASES = [
    pytest.param(name, rewrite, id=f"{name}-{rewrite.__name__}")
    for rewrite, names in REWRITES.items()
    for name in names
]


def changed_names(model: PreTrainedModel, name: str) -> set[str]:
    """The names of the parameters that differ from the original model's."""
    before = dict(model_of(name).named_parameters())
    return {n for n, now in model.named_parameters() if not torch.equal(now, before[n])}


class TestTheFunctionIsKept:
    @pytest.mark.parametrize("dtype", TOLERANCE, ids=["float64", "float32"])
    @pytest.mark.parametrize(("name", "rewrite"), CASES)
    def test_logits_stay(self, name: str, rewrite: Rewrite, dtype: torch.dtype) -> None:
        model = model_of(name, dtype)
        rewrite(model)
        assert deviation(model, name, dtype) < TOLERANCE[dtype]

    @pytest.mark.parametrize(("name", "rewrite"), CASES)
    def test_weights_change(self, name: str, rewrite: Rewrite) -> None:
        model = model_of(name)
        rewrite(model)
        assert changed_names(model, name)

    @pytest.mark.parametrize("name", TINY)
    def test_each_changed_weight_is_needed(self, name: str) -> None:
        original = dict(model_of(name).named_parameters())
        model = model_of(name)
        everything(model)
        tried = [n for n in changed_names(model, name) if ".0." not in n and ".2." not in n]
        assert len(tried) >= 6
        for parameter in tried:
            rewritten = model.get_parameter(parameter)
            kept = rewritten.clone()
            rewritten.copy_(original[parameter])
            assert deviation(model, name) > VISIBLE
            rewritten.copy_(kept)

    @pytest.mark.parametrize("name", HOOKABLE)
    def test_the_offline_half_of_an_online_rotation_alone_is_seen(self, name: str) -> None:
        model = model_of(name)
        rotate_down_weights(model)
        assert deviation(model, name) > VISIBLE

    @pytest.mark.parametrize("name", TINY)
    def test_rotating_the_blocks_without_the_ends_is_seen(self, name: str) -> None:
        model = model_of(name)
        fuse_block_norms(model)
        rotate_blocks(model)
        assert deviation(model, name) > VISIBLE

    @pytest.mark.parametrize("name", TINY)
    def test_fused_norms_are_ones(self, name: str) -> None:
        model = model_of(name)
        fuse_block_norms(model)
        for _, block, site in sites_of(model, "norms"):
            weight = block.get_parameter(site.producer.weight)
            assert torch.equal(weight, torch.ones_like(weight))


class TestRotation:
    @pytest.mark.parametrize("name", TINY)
    def test_the_inverse_returns_the_weights(self, name: str) -> None:
        model, rotation = model_of(name), Hadamard.of(TINY[name]().hidden_size, seed=3)
        for block, graph in graphs(model):
            before = {n: parameter.clone() for n, parameter in block.named_parameters()}
            rotate_residual(block, graph, rotation)
            assert any(not torch.equal(now, before[n]) for n, now in block.named_parameters())
            rotate_residual(block, graph, rotation, inverse=True)
            for n, now in block.named_parameters():
                torch.testing.assert_close(now, before[n], rtol=0, atol=1e-13)

    def test_readers_turn_with_r_and_writers_with_its_transpose(self) -> None:
        model = model_of("llama-untied")
        block, graph = next(graphs(model))
        rotation = Hadamard.of(48, seed=3)
        q, down = (
            block.get_parameter(f"{n}.weight") for n in ("self_attn.q_proj", "mlp.down_proj")
        )
        bias, r = block.mlp.down_proj.bias, rotation.matrix()
        expected = q @ r, r.T @ down, bias @ r
        rotate_residual(block, graph, rotation)
        torch.testing.assert_close((q.data, down.data, bias.data), expected)

    def test_only_attention_values_are_rotated_per_head(self) -> None:
        _, block, site = next(sites_of(model_of("llama"), "up_down"))
        with pytest.raises(ValueError, match="'down' does not read attention values"):
            rotate_value_output(block, site, Hadamard.of(16, seed=None))


class TestRotatedEnds:
    @pytest.mark.parametrize("name", TIED)
    def test_names_and_tie_stay(self, name: str) -> None:
        model = model_of(name)
        names = list(model.state_dict())
        rotate_stream_online(model)
        assert list(model.state_dict()) == names
        assert model.lm_head.weight is model.model.embed_tokens.weight

    @pytest.mark.parametrize("name", TIED)
    def test_stop_rotating_undoes_it(self, name: str) -> None:
        model = tiny_model(name)
        ends = model.model.embed_tokens, model.model.norm
        classes, names = [type(end) for end in ends], list(model.state_dict())
        modules, logits = list(model.modules()), model(TOKENS).logits
        rotate_ends(*ends, Hadamard.of(model.config.hidden_size, seed=5))
        assert all(type(end) is not stock for end, stock in zip(ends, classes, strict=True))
        assert all(isinstance(end, stock) for end, stock in zip(ends, classes, strict=True))
        for end in ends:
            stop_rotating(end)
        assert [type(end) for end in ends] == classes
        assert list(model.state_dict()) == names
        assert list(model.modules()) == modules
        assert torch.equal(model(TOKENS).logits, logits)

    def test_stop_rotating_leaves_other_modules_alone(self) -> None:
        linear = nn.Linear(2, 2)
        stop_rotating(linear)
        assert type(linear) is nn.Linear


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
    return block, Site("site", (reader,), Norm("norm.weight"), (router,))


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
        model = model_of("llama-untied")
        _, block, site = next(sites_of(model, "value_output"))
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

    def test_a_site_without_producer_is_refused(self) -> None:
        block, site = norm_and_readers()
        with pytest.raises(ValueError, match="'alone' has no producer"):
            smooth(block, Site("alone", site.readers, None), column(1, 2, 3), alpha=0.5)


def store_norms(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Round the norms that smoothing has divided, as storing them would."""
    for _, block, site in sites_of(model, "norms"):
        weight = block.get_parameter(site.producer.weight)
        weight.copy_(weight.to(dtype))


def smooth_norms_for(model: PreTrainedModel, dtype: torch.dtype) -> None:
    for number, block, site in sites_of(model, "norms"):
        maxima = random_maxima(width_of(block, site), seed=number)
        smooth(block, site, maxima, alpha=0.5, norm_dtype=dtype)


class TestStoredNorms:
    @pytest.mark.parametrize("fused", [False, True], ids=["norms-as-they-are", "norms-fused"])
    @pytest.mark.parametrize("name", TINY)
    def test_rounding_a_smoothed_norm_keeps_the_function(self, name: str, fused: bool) -> None:
        model = model_of(name)
        if fused:
            fuse_block_norms(model)
        smooth_norms_for(model, torch.bfloat16)
        store_norms(model, torch.bfloat16)
        assert deviation(model, name) < TOLERANCE[torch.float64]

    def test_rounding_is_seen_where_smoothing_did_not_know_of_it(self) -> None:
        model = model_of("llama")
        smooth_norms(model)
        store_norms(model, torch.bfloat16)
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
