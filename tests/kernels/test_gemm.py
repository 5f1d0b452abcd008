"""The products and the Hadamard of smoothq.kernels against their reference definitions.

Integer sums must be exact, or rounded once to float32 where they leave its 24 bits. A float result
is computed in float32 and rounded once to its dtype.
"""

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import tree_map_only

from smoothq import kernels
from smoothq.rounding.packing import pack
from smoothq.transforms.hadamard import Hadamard

cpu, reference = kernels.cpu, kernels.reference
FEW = settings(max_examples=20, deadline=None, derandomize=True)
RELATIVE_RMS = 1e-6

seeds = st.integers(0, 2**32 - 1)
odd_sizes = st.sampled_from([1, 2, 3, 17, 33, 65])
output_dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])

exact_products = pytest.mark.parametrize(
    "product", [cpu.int8_matmul, cpu._float_lanes, cpu._int_mm], ids=["chosen", "lanes", "int_mm"]
)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


class Draw:
    """Operands from one seed."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def codes(self, *shape: int, lowest: int = -128, highest: int = 127) -> Tensor:
        drawn = torch.randint(lowest, highest + 1, shape, generator=self.generator)
        return drawn.to(torch.int8)

    def scales(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator) * 0.01 + 0.001

    def floats(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def multipliers(self, *shape: int) -> Tensor:
        magnitude = torch.randint(1, 16, shape, generator=self.generator)
        sign = 1 - 2 * torch.randint(2, shape, generator=self.generator)
        return (magnitude * sign).to(torch.int8)

    def orders(self, batch: int, width: int) -> Tensor:
        return torch.stack([torch.randperm(width, generator=self.generator) for _ in range(batch)])


def assert_rounded_once(found: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """`found`, in `dtype`, is the float64 `exact` to RELATIVE_RMS and one rounding to the dtype."""
    assert found.dtype == dtype
    assert exact.dtype == torch.float64
    assert found.shape == exact.shape
    assert bool(found.isfinite().all())
    error, size = found.double() - exact, exact.pow(2).mean().sqrt()
    if dtype == torch.float32:
        assert error.pow(2).mean().sqrt() <= RELATIVE_RMS * size
    half_ulp = torch.finfo(dtype).eps / 2 * exact.abs() + torch.finfo(dtype).smallest_normal
    assert bool((error.abs() <= half_ulp + 10 * RELATIVE_RMS * size).all())


def integer_sum(a: Tensor, w: Tensor) -> Tensor:
    """The sum in int64, rounded once to float32: the very integer below 2²⁴."""
    return (a.long() @ w.long().t()).float()


class TestIntegerProduct:
    @exact_products
    @pytest.mark.parametrize("width", [1, 2, 1023, 1024, 1025, 2048, 5000])
    @pytest.mark.parametrize(("left", "right"), [(-128, -128), (-128, 127), (127, 127)])
    def test_the_largest_sums(
        self, product: Callable[[Tensor, Tensor], Tensor], width: int, left: int, right: int
    ) -> None:
        a = torch.full((3, width), left, dtype=torch.int8)
        w = torch.full((5, width), right, dtype=torch.int8)
        w[1, -1] = 1
        total = product(a, w)
        assert total.dtype == torch.float32
        assert torch.equal(total, integer_sum(a, w))

    @exact_products
    @pytest.mark.parametrize("width", [1023, 1025, 2048, 5000])
    def test_sums_in_which_nothing_cancels(
        self, product: Callable[[Tensor, Tensor], Tensor], width: int
    ) -> None:
        draw = Draw()
        a, w = draw.codes(17, width, lowest=119), draw.codes(33, width, lowest=119)
        assert torch.equal(product(a, w), integer_sum(a, w))

    @exact_products
    @FEW
    @given(
        seeds, odd_sizes, odd_sizes, st.sampled_from([1, 2, 3, 31, 64, 129, 576, 1100, 3001, 5000])
    )
    def test_any_shape(
        self,
        product: Callable[[Tensor, Tensor], Tensor],
        seed: int,
        tokens: int,
        rows: int,
        width: int,
    ) -> None:
        draw = Draw(seed)
        a, w = draw.codes(tokens, width), draw.codes(rows, width)
        assert torch.equal(product(a, w), integer_sum(a, w))


class TestInt8Gemm:
    @FEW
    @given(seeds, odd_sizes, odd_sizes, odd_sizes, st.booleans(), st.booleans(), output_dtypes)
    def test_reference(
        self,
        seed: int,
        tokens: int,
        rows: int,
        width: int,
        per_token: bool,
        biased: bool,
        dtype: torch.dtype,
    ) -> None:
        draw = Draw(seed)
        operands = (
            draw.codes(tokens, width),
            draw.scales(tokens if per_token else 1, 1),
            draw.codes(rows, width),
            draw.scales(rows),
            draw.floats(rows) if biased else None,
        )
        exact = reference.int8_gemm(*operands, torch.float64)
        assert_rounded_once(kernels.int8_gemm(*operands, dtype), exact, dtype)

    @each_dtype
    def test_a_bias_in_the_models_dtype(self, dtype: torch.dtype) -> None:
        draw = Draw()
        operands = (draw.codes(17, 33), draw.scales(17, 1), draw.codes(9, 33), draw.scales(9))
        bias = draw.floats(9).to(dtype)
        exact = reference.int8_gemm(*operands, bias, torch.float64)
        assert_rounded_once(kernels.int8_gemm(*operands, bias, dtype), exact, dtype)

    def test_powers_of_two_as_scales_leave_the_integers(self) -> None:
        draw = Draw()
        codes, weight = draw.codes(5, 100), draw.codes(7, 100)
        found = kernels.int8_gemm(
            codes, torch.full((5, 1), 0.5), weight, torch.full((7,), 4.0), None, torch.float32
        )
        assert torch.equal(found.long(), 2 * (codes.long() @ weight.long().t()))


def operands_of(tokens: int) -> dict[str, tuple[object, ...]]:
    """Operands of every operator that takes tokens, for a number of them."""
    draw = Draw()
    packed, cached = draw.codes(3, 32).view(torch.uint8), reference.quantize_heads
    x, codes, scale = draw.floats(tokens, 64), draw.codes(tokens, 64), draw.scales(tokens, 1)
    keys, query = cached(draw.floats(1, 2, 5, 64), 8, None), draw.codes(1, 2, tokens, 64)
    signs, order = 2 * draw.codes(64, lowest=0, highest=1) - 1, draw.orders(2, 64)
    factors = Hadamard.of(64, seed=0).factors()
    return {
        "int8_gemm": (codes, scale, draw.codes(3, 64), draw.scales(3), None, torch.half),
        "int4_gemm": (codes, scale, packed, draw.scales(3), None, draw.floats(3), torch.float32),
        "expert_gemm": (
            *(codes, scale, torch.tensor([0, tokens]), [draw.codes(3, 64), draw.codes(3, 64)]),
            *([draw.scales(3), draw.scales(3)], [], [draw.floats(3), draw.floats(3)], torch.half),
        ),
        "group_gemm": (
            *(draw.codes(2, tokens, 64), draw.scales(2, tokens, 1), draw.scales(2, 2), order),
            *(draw.codes(3, 64), draw.scales(3, 1), None, 32, torch.float32),
        ),
        "expert_weight_only_gemm": (
            *(x, torch.tensor([0, tokens]), [packed, packed], [draw.scales(3, 2)] * 2),
            *([], [draw.floats(3), draw.floats(3)], 4),
        ),
        "weight_only_gemm": (x, packed, draw.scales(3, 2), None, draw.floats(3), 4),
        "fp_gemm": (x, packed, draw.codes(3, 2).abs().view(torch.uint8), None, None, "e2m1"),
        "fp8_gemm": (
            *(codes.clamp(0, 126).view(torch.uint8), scale),
            draw.codes(3, 64, lowest=0, highest=126).view(torch.uint8),
            *(draw.scales(3, 1), draw.floats(3), torch.half),
        ),
        "fp8_quantize": (x, "token"),
        "mx_quantize": (x, "e2m1"),
        "fp_quantize": (x, "e4m3", "token"),
        "hadamard": (x, signs, *factors),
        "hadamard_quantize": (x, signs, *factors, 4, 32),
        "quantize_per_token": (x, 8),
        "quantize_per_tensor": (x, 8),
        "quantize_smoothed": (x, draw.multipliers(64).abs(), 4),
        "quantize_token_groups": (x, 4, 32),
        "runtime_smooth_quantize": (x.expand(2, tokens, 64), 4, 32),
        "static_quantize": (x, torch.tensor(0.1), 8),
        "quantize_heads": (draw.floats(1, 2, tokens, 64), 8, None),
        "cached_attention": (*(query.float(), keys, keys, None, None, None, None, 0.1, 8, None),),
        "int8_attention": (
            *(query, draw.scales(1, 2, tokens, 1), keys, keys, None, 0.1, 8, torch.float32),
        ),
    }


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("tokens", [0, 1])
@pytest.mark.parametrize("operator", sorted(operands_of(1)))
def test_no_token_and_one(operator: str, tokens: int, backend: str) -> None:
    module, device = importlib.import_module(f"smoothq.kernels.{backend}"), "cpu"
    if backend == "triton" and torch.cuda.is_available():
        device = "cuda"
    operands = tree_map_only(Tensor, lambda o: o.to(device), operands_of(tokens)[operator])
    results, expected = (getattr(m, operator)(*operands) for m in (module, reference))
    if isinstance(results, Tensor):
        results, expected = (results,), (expected,)
    for found, exact in zip(results, expected, strict=True):
        if exact is not None:
            assert (found.shape, found.dtype) == (exact.shape, exact.dtype)
            assert torch.allclose(found.float(), exact.float(), atol=1e-5, rtol=1e-3)


class TestGroupGemm:
    @FEW
    @given(
        seeds,
        st.sampled_from([1, 3]),
        st.sampled_from([1, 2, 17, 33]),
        odd_sizes,
        st.sampled_from([(1, 7), (3, 5), (8, 3), (33, 1), (64, 9)]),
        st.sampled_from(["blocks, ordered", "blocks", "weight groups", "weight groups and blocks"]),
        st.booleans(),
        st.booleans(),
        output_dtypes,
    )
    def test_reference(
        self,
        seed: int,
        batch: int,
        length: int,
        rows: int,
        grouping: tuple[int, int],
        form: str,
        per_token: bool,
        biased: bool,
        dtype: torch.dtype,
    ) -> None:
        draw, (size, groups) = Draw(seed), grouping
        width = size * groups
        weight_groups = groups if form.startswith("weight groups") else 1
        operands = (
            draw.codes(batch, length, width),
            draw.scales(batch, length, 1) if per_token else draw.scales(1, 1, 1),
            draw.scales(batch, groups) * 100 if "blocks" in form else None,
            draw.orders(batch, width) if "ordered" in form else None,
            draw.codes(rows, width),
            draw.scales(rows, weight_groups),
            draw.floats(rows) if biased else None,
            size,
        )
        exact = reference.group_gemm(*operands, torch.float64)
        assert_rounded_once(kernels.group_gemm(*operands, dtype), exact, dtype)

    def test_scales_of_16_bits(self) -> None:
        draw = Draw()
        scale = draw.scales(9, 3).bfloat16()
        rest = (draw.codes(9, 24), scale, None, 8)
        operands = (draw.codes(1, 5, 24), draw.scales(1, 5, 1), None, None, *rest)
        exact = reference.group_gemm(*operands, torch.float64)
        assert_rounded_once(kernels.group_gemm(*operands, torch.float32), exact, torch.float32)

    def test_with_a_scale_for_every_block_alike_it_is_the_plain_product(self) -> None:
        draw = Draw()
        codes, scale = draw.codes(2, 5, 24), draw.scales(2, 5, 1)
        weight, weight_scale = draw.codes(9, 24), draw.scales(9, 1)
        grouped = kernels.group_gemm(
            codes, scale, torch.ones(2, 3), None, weight, weight_scale, None, 8, torch.float32
        )
        plain = kernels.int8_gemm(
            codes.flatten(0, 1),
            scale.flatten(0, 1),
            weight,
            weight_scale.squeeze(1),
            None,
            torch.float32,
        )
        assert torch.allclose(grouped.flatten(0, 1), plain, rtol=1e-5, atol=1e-4)

    def test_codes_in_another_order_meet_their_own_columns(self) -> None:
        draw = Draw()
        x, weight = draw.floats(2, 9, 24), draw.codes(5, 24)
        weight_scale = draw.scales(5, 1)
        quantized = kernels.runtime_smooth_quantize(x, 8, 8)
        found = kernels.group_gemm(*quantized, weight, weight_scale, None, 8, torch.float32)
        exact = x.double() @ (weight.double() * weight_scale.double()).t()
        assert (found - exact).pow(2).mean().sqrt() < 0.02 * exact.pow(2).mean().sqrt()


def weight_only_operands(
    draw: Draw, tokens: int, rows: int, width: int, bits: int, groups: int, multiplied: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """x, packed codes, their scales and multipliers."""
    highest = kernels.highest_code(bits)
    codes = draw.codes(rows, width, lowest=-highest - 1, highest=highest)
    return (
        draw.floats(tokens, width),
        pack(codes, bits).flatten(1),
        draw.scales(rows, 1 if multiplied else groups),
        draw.multipliers(rows, groups) if multiplied else None,
    )


class TestWeightOnlyGemm:
    @FEW
    @given(
        seeds,
        odd_sizes,
        odd_sizes,
        st.sampled_from([(1, 1), (2, 1), (33, 1), (301, 1), (8, 3), (5, 5), (64, 9)]),
        st.sampled_from([4, 8]),
        st.booleans(),
        st.booleans(),
        output_dtypes,
    )
    def test_reference(
        self,
        seed: int,
        tokens: int,
        rows: int,
        grouping: tuple[int, int],
        bits: int,
        multiplied: bool,
        biased: bool,
        dtype: torch.dtype,
    ) -> None:
        draw, (size, groups) = Draw(seed), grouping
        x, *weight = weight_only_operands(
            draw, tokens, rows, size * groups, bits, groups, multiplied
        )
        x = x.to(dtype)
        bias = draw.floats(rows) if biased else None
        exact = reference.weight_only_gemm(x.double(), *weight, bias, bits)
        assert_rounded_once(kernels.weight_only_gemm(x, *weight, bias, bits), exact, dtype)

    @pytest.mark.parametrize("bits", [4, 8])
    @pytest.mark.parametrize("rows", [255, 257, 700])
    def test_more_rows_than_are_unpacked_at_a_time(self, bits: int, rows: int) -> None:
        x, *weight = weight_only_operands(Draw(), 3, rows, 35, bits, 5, multiplied=True)
        exact = reference.weight_only_gemm(x.double(), *weight, None, bits)
        found = kernels.weight_only_gemm(x, *weight, None, bits)
        assert_rounded_once(found, exact, torch.float32)

    def test_scales_of_16_bits(self) -> None:
        x, packed, scale, _ = weight_only_operands(Draw(), 3, 9, 24, 4, 3, multiplied=False)
        operands = (packed, scale.bfloat16(), None, None, 4)
        exact = reference.weight_only_gemm(x.double(), *operands)
        assert_rounded_once(kernels.weight_only_gemm(x, *operands), exact, torch.float32)


class TestHadamard:
    @each_dtype
    @pytest.mark.parametrize("width", [1, 2, 12, 92, 96, 576, 1536])
    @pytest.mark.parametrize("shape", [(1,), (17,), (2, 3)])
    def test_reference(self, shape: tuple[int, ...], width: int, dtype: torch.dtype) -> None:
        rotation = Hadamard.of(width, seed=1)
        x = Draw().floats(*shape, width).to(dtype)
        factors = (rotation.signs(), *rotation.factors())
        exact = reference.hadamard(x.double(), *factors)
        assert_rounded_once(kernels.hadamard(x, *factors), exact, dtype)

    def test_float64_stays_float64(self) -> None:
        rotation = Hadamard.of(96, seed=1)
        x = Draw().floats(5, 96).double()
        factors = (rotation.signs(), *rotation.factors())
        found, exact = kernels.hadamard(x, *factors), reference.hadamard(x, *factors)
        assert torch.allclose(found, exact, rtol=0, atol=1e-13)
        assert torch.allclose(found.pow(2).sum(-1), x.pow(2).sum(-1), rtol=1e-13)


def _int8_gemm() -> tuple[Any, ...]:
    draw = Draw()
    operands = (draw.codes(5, 24), draw.scales(5, 1), draw.codes(7, 24), draw.scales(7))
    return (*operands, draw.floats(7), torch.bfloat16)


def _group_gemm(ordered: bool) -> tuple[Any, ...]:
    draw = Draw()
    codes, scale, weight = draw.codes(2, 5, 24), draw.scales(2, 5, 1), draw.codes(7, 24)
    if ordered:
        blocks, order = draw.scales(2, 3), draw.orders(2, 24)
        return (codes, scale, blocks, order, weight, draw.scales(7, 1), None, 8, torch.float32)
    weight_scale = draw.scales(7, 3).bfloat16()
    return (codes, scale, None, None, weight, weight_scale, draw.floats(7), 8, torch.float16)


def _weight_only_gemm(bits: int) -> tuple[Any, ...]:
    draw = Draw()
    operands = weight_only_operands(draw, 5, 7, 24, bits, 3, multiplied=bits == 4)
    return (*operands, draw.floats(7) if bits == 8 else None, bits)


def _fp_gemm() -> tuple[Any, ...]:
    draw = Draw()
    packed, scale = draw.codes(7, 32).view(torch.uint8), draw.codes(7, 4, lowest=1)
    tensors = (draw.floats(5, 64), packed, scale.view(torch.uint8), draw.scales(1))
    return (*tensors, draw.floats(7), "e2m1")


def _fp8_gemm() -> tuple[Any, ...]:
    draw = Draw()
    codes, weight = (
        draw.codes(rows, 64, lowest=0, highest=126).view(torch.uint8) for rows in (5, 7)
    )
    return (codes, draw.scales(5, 2), weight, draw.scales(7, 2), draw.floats(7), torch.float16)


def _mx_gemm() -> tuple[Any, ...]:
    draw = Draw()
    codes, weight = (draw.codes(rows, 32).view(torch.uint8) for rows in (5, 7))
    scale, steps = (draw.codes(n, 2, lowest=110).view(torch.uint8) for n in (5, 7))
    return (codes, scale, weight, steps, draw.floats(7), "e2m1", torch.float32)


OPERATORS = {
    "mx_gemm": (kernels.mx_gemm, _mx_gemm()),
    "fp8_gemm": (kernels.fp8_gemm, _fp8_gemm()),
    "fp_gemm": (kernels.fp_gemm, _fp_gemm()),
    "int8_gemm": (kernels.int8_gemm, _int8_gemm()),
    "group_gemm, blocks": (kernels.group_gemm, _group_gemm(ordered=True)),
    "group_gemm, weight groups": (kernels.group_gemm, _group_gemm(ordered=False)),
    "weight_only_gemm, 4 bits": (kernels.weight_only_gemm, _weight_only_gemm(4)),
    "weight_only_gemm, 8 bits": (kernels.weight_only_gemm, _weight_only_gemm(8)),
}


class TestAsPyTorchOperators:
    @pytest.fixture(autouse=True)
    def nothing_compiled_before(self) -> None:
        torch.compiler.reset()

    @pytest.mark.parametrize("name", OPERATORS)
    def test_opcheck(self, name: str) -> None:
        operator, operands = OPERATORS[name]
        torch.library.opcheck(operator.registered, operands)

    @pytest.mark.parametrize("name", OPERATORS)
    @pytest.mark.parametrize("backend", ["eager", "aot_eager"])
    def test_a_whole_graph_compiles_and_gives_the_same(self, name: str, backend: str) -> None:
        operator, operands = OPERATORS[name]
        # The last operand is a dtype or a number: a constant of the graph.
        *tensors, constant = operands

        @torch.compile(fullgraph=True, backend=backend)
        def compiled(*tensors: Any) -> Tensor:
            return operator(*tensors, constant) + 1

        assert torch.equal(compiled(*tensors), operator(*operands) + 1)

    def test_a_layer_is_one_graph_with_the_product_in_it_whole(self) -> None:
        rotation = Hadamard.of(24, seed=0)
        factors = (rotation.signs(), *rotation.factors())
        draw = Draw()
        x, weight, scale = draw.floats(5, 24), draw.codes(7, 24), draw.scales(7)
        graphs = []

        def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
            graphs.append(graph)
            return graph.forward

        def layer(x: Tensor) -> Tensor:
            quantized = kernels.quantize_token_groups(kernels.hadamard(x, *factors), 4, 8)
            codes, token_scale, *_ = quantized
            return kernels.int8_gemm(codes, token_scale, weight, scale, None, x.dtype)

        compiled = torch.compile(layer, fullgraph=True, backend=backend)
        # What is traced rotates in another order of sums than what is not.
        assert torch.allclose(compiled(x), layer(x), rtol=1e-6)
        assert len(graphs) == 1
        targets = [str(node.target) for node in graphs[0].graph.nodes]
        assert sum("smoothq.int8_gemm" in target for target in targets) == 1

    def test_meta_tensors_give_shape_and_dtype(self) -> None:
        for operator, operands in OPERATORS.values():
            meta = [o.to("meta") if isinstance(o, Tensor) else o for o in operands]
            found, real = operator(*meta), operator(*operands)
            assert found.is_meta
            assert (found.shape, found.dtype) == (real.shape, real.dtype)


class TestDevices:
    def test_runs_on(self) -> None:
        assert kernels.runs_on("cpu")
        assert not kernels.runs_on("abacus")

    @pytest.mark.parametrize(
        "call",
        [
            *(lambda o=o, operands=a: o(*operands) for o, a in OPERATORS.values()),
            lambda: kernels.hadamard(torch.ones(1, 1), *torch.ones(3, 1, 1, dtype=torch.int8)),
            lambda: kernels.quantize_per_token(torch.ones(1, 2), 4),
            lambda: kernels.quantize_per_tensor(torch.ones(1, 2), 4),
            lambda: kernels.static_quantize(torch.ones(1, 2), torch.ones(()), 4),
            lambda: kernels.quantize_token_groups(torch.ones(1, 2), 4, 2),
            lambda: kernels.quantize_smoothed(torch.ones(1, 2), torch.ones(2).char(), 4),
            lambda: kernels.channel_multipliers(torch.ones(2), 4),
            lambda: kernels.fp8_quantize(torch.ones(1, 2), "token"),
            lambda: kernels.multiplies_fp8(torch.device("cpu")),
            lambda: kernels.multiplies_mx(torch.device("cpu")),
            lambda: kernels.mx_quantize(torch.ones(1, 64), "e2m1"),
            lambda: kernels.fp_quantize(torch.ones(1, 2), "e4m3", "token"),
            lambda: kernels.runtime_smooth_quantize(torch.ones(1, 1, 2), 4, 2),
        ],
        ids=[
            *OPERATORS,
            "hadamard",
            "quantize_per_token",
            "quantize_per_tensor",
            "static_quantize",
            "quantize_token_groups",
            "quantize_smoothed",
            "channel_multipliers",
            "fp8_quantize",
            "multiplies_fp8",
            "multiplies_mx",
            "mx_quantize",
            "fp_quantize",
            "runtime_smooth_quantize",
        ],
    )
    def test_a_device_without_kernels_is_refused_by_name(
        self, call: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(kernels, "_BACKENDS", {})
        with pytest.raises(NotImplementedError, match=r"no kernel.* for device 'cpu'"):
            call()
