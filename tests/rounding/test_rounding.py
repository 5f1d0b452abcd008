"""From float weights to codes: scales, round to nearest, GPTQ, and how codes are packed."""

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from smoothq.errors import NumericsError
from smoothq.recipe.recipe import Gptq
from smoothq.rounding.gptq import factorise, gptq, inverse_factor
from smoothq.rounding.grid import IntegerGrid, QuantizedWeight, Scales
from smoothq.rounding.packing import pack, packed_like, unpack
from smoothq.rounding.rtn import round_to_nearest

FEW = settings(max_examples=20, deadline=None, derandomize=True)
WIDTH, GROUP = 48, 16

seeds = st.integers(0, 2**32 - 1)


def grid(kind: str, bits: int = 4, clip: bool = False, width: int = WIDTH) -> IntegerGrid:
    """The grid that a recipe would make of a matrix `width` wide."""
    granularity, *form = kind.split(", ")
    return IntegerGrid(
        bits,
        granularity,  # type: ignore[arg-type]
        GROUP if granularity == "group" else width,
        multiplier="multipliers" in form,
        clip=clip,
        full_range="full range" in form,
        symmetric="zero points" not in form,
    )


ZEROS = ["channel, zero points", "group, zero points"]
KINDS = ["tensor", "channel", "group", "channel, full range", "group, multipliers", *ZEROS]
each_kind = pytest.mark.parametrize("kind", KINDS)
each_width = pytest.mark.parametrize("bits", [4, 8])
# Multipliers stand beside 4-bit codes only.
each_kind_and_width = pytest.mark.parametrize(
    ("kind", "bits"),
    [(kind, bits) for kind in KINDS for bits in (4, 8) if bits == 4 or "multipliers" not in kind],
)
each_clip = pytest.mark.parametrize("clip", [False, True], ids=["absmax", "clip search"])


def matrix(rows: int, columns: int = WIDTH, seed: int = 0) -> Tensor:
    """Weights with heavy tails, float32."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator).pow(3) * 0.02


def groups_of(weight: Tensor, kind: str) -> Tensor:
    """The matrix cut into what shares a scale: float64 (…, elements)."""
    if kind == "tensor":
        return weight.double().flatten()
    return weight.double().unflatten(-1, (-1, WIDTH if kind.startswith("channel") else GROUP))


def lattice(scales: Scales) -> tuple[Tensor, Tensor]:
    """The value of a code and the zero point of every element, float64 (N, K)."""
    step = scales.step_by_column(WIDTH, torch.float64)
    zero = scales.zero_by_column(WIDTH, torch.float64)
    return step, torch.zeros_like(step) if zero is None else zero


class TestScales:
    @each_width
    def test_a_channel_covers_its_maximum(self, bits: int) -> None:
        weight = matrix(9)
        scales = grid("channel", bits).find_scales(weight)
        assert scales.scale.dtype == torch.float32
        assert scales.multiplier is None
        highest = 2 ** (bits - 1) - 1
        maxima = [max(abs(value) for value in row) for row in weight.tolist()]
        assert scales.scale.tolist() == [[pytest.approx(m / highest, rel=1e-6)] for m in maxima]

    def test_a_tensor_has_one_scale_at_every_row(self) -> None:
        weight = matrix(9)
        scales = grid("tensor").find_scales(weight)
        largest = weight.abs().max().item() / 7
        assert scales.scale.tolist() == [[pytest.approx(largest, rel=1e-6)]] * 9

    @each_width
    def test_a_group_stores_its_own_scale_in_16_bits(self, bits: int) -> None:
        weight = matrix(9)
        scales = grid("group", bits).find_scales(weight)
        assert scales.scale.dtype == torch.bfloat16
        assert scales.scale.shape == (9, WIDTH // GROUP)
        exact = groups_of(weight, "group").abs().amax(-1) / (2 ** (bits - 1) - 1)
        assert torch.equal(scales.scale, exact.float().bfloat16())

    @each_width
    @each_clip
    def test_full_range_brings_the_largest_weight_to_the_lowest_code(
        self, bits: int, clip: bool
    ) -> None:
        weight = matrix(40)
        rounded = round_to_nearest(weight, grid("channel, full range", bits, clip))
        where = weight.abs().argmax(-1, keepdim=True)
        extremes = weight.gather(1, where)
        assert torch.equal(rounded.scales.scale < 0, extremes > 0)
        assert bool((rounded.codes.gather(1, where) == -(2 ** (bits - 1))).all())
        if not clip:
            expected = extremes / -(2 ** (bits - 1))
            assert torch.allclose(rounded.scales.scale, expected, rtol=1e-6, atol=0)

    def test_multipliers_are_the_least_that_cover_each_group(self) -> None:
        weight = matrix(9)
        weight[:, :GROUP] *= 0.01
        scales = grid("group, multipliers").find_scales(weight)
        lowest, largest = 8, 15
        assert scales.scale.dtype == torch.float32
        assert scales.multiplier is not None
        assert scales.multiplier.dtype == torch.int8
        assert scales.multiplier.shape == (9, WIDTH // GROUP)
        base = weight.double().abs().amax(-1) / (lowest * largest)
        assert torch.allclose(scales.scale.double().squeeze(1), base, rtol=1e-6, atol=0)
        for row, group, m in zip(*_grid_of_indices(9), scales.multiplier.flatten(), strict=True):
            values = groups_of(weight, "group")[row, group]
            extreme = values[values.abs().argmax()]
            assert (m < 0) == (extreme > 0)
            assert 1 <= m.abs() <= largest
            assert m.abs() * base[row] * lowest >= extreme.abs() * (1 - 1e-6)
            assert m.abs() == 1 or (m.abs() - 1) * base[row] * lowest < extreme.abs() * (1 + 1e-6)

    @each_clip
    @each_kind
    def test_a_multiplied_code_fits_int8(self, kind: str, clip: bool) -> None:
        rounded = round_to_nearest(matrix(40), grid(kind, clip=clip))
        multiplier = rounded.scales.multiplier
        if multiplier is not None:
            assert 1 <= multiplier.abs().min().item() <= multiplier.abs().max().item() <= 15
            products = groups_of(rounded.codes, kind) * multiplier.unsqueeze(-1)
            assert products.abs().max().item() <= 127

    @each_kind_and_width
    @FEW
    @given(seed=seeds)
    def test_the_clip_search_is_never_worse_than_the_maximum(
        self, kind: str, bits: int, seed: int
    ) -> None:
        weight = matrix(9, seed=seed)

        def error(clip: bool) -> Tensor:
            rounded = round_to_nearest(weight, grid(kind, bits, clip)).dequantize(torch.float64)
            return groups_of(rounded - weight.double(), kind).abs().pow(2.4).sum(-1)

        assert bool((error(clip=True) <= error(clip=False) * (1 + 1e-5)).all())

    @each_kind
    def test_the_clip_search_gains_on_heavy_tails(self, kind: str) -> None:
        weight = matrix(40)
        clipped, covering = (
            round_to_nearest(weight, grid(kind, clip=clip)).dequantize().sub(weight).abs().pow(2.4)
            for clip in (True, False)
        )
        most = 1 if kind in ZEROS else 0.97  # zero points take most of a tail by themselves
        assert clipped.sum() < most * covering.sum()

    @each_clip
    @pytest.mark.parametrize("kind", KINDS[1:])
    def test_rows_are_independent_however_many_there_are(self, kind: str, clip: bool) -> None:
        weight = matrix(515)
        whole = round_to_nearest(weight, grid(kind, clip=clip))
        for row in (0, 511, 512, 514):
            alone = round_to_nearest(weight[row : row + 1], grid(kind, clip=clip))
            assert torch.equal(whole.codes[row], alone.codes[0])
            assert torch.equal(whole.dequantize()[row], alone.dequantize()[0])

    @each_clip
    @each_kind
    def test_a_row_of_zeros_stays_zero(self, kind: str, clip: bool) -> None:
        weight = matrix(4)
        weight[2] = 0
        rounded = round_to_nearest(weight, grid(kind, clip=clip))
        assert not rounded.dequantize()[2].any()
        assert rounded.dequantize()[1].any()
        assert bool((rounded.scales.step(torch.float32) != 0).all())

    @each_kind
    def test_codes_are_all_that_the_bits_hold(self, kind: str) -> None:
        assert (grid(kind).lowest, grid(kind).highest) == (-8, 7)
        assert (grid(kind, 8).lowest, grid(kind, 8).highest) == (-128, 127)


def _grid_of_indices(rows: int) -> tuple[list[int], list[int]]:
    groups = WIDTH // GROUP
    return [n // groups for n in range(rows * groups)], list(range(groups)) * rows


class TestRoundToNearest:
    @each_kind_and_width
    @each_clip
    def test_no_other_point_of_the_grid_is_nearer(self, kind: str, bits: int, clip: bool) -> None:
        weight = matrix(5)
        chosen = grid(kind, bits, clip)
        rounded = round_to_nearest(weight, chosen)
        assert rounded.codes.dtype == torch.int8
        step, zero = lattice(rounded.scales)
        points = torch.arange(chosen.lowest, chosen.highest + 1) - zero.unsqueeze(-1)
        nearest = (weight.double().unsqueeze(-1) - points * step.unsqueeze(-1)).abs().amin(-1)
        found = (weight.double() - rounded.dequantize(torch.float64)).abs()
        assert bool((found <= nearest + 1e-5 * step.abs()).all())

    def test_dequantized_codes_are_rounded_to_themselves(self) -> None:
        first = round_to_nearest(matrix(5), grid("channel"))
        again = round_to_nearest(first.dequantize(), grid("channel"))
        assert torch.equal(first.codes, again.codes)


def tokens(width: int, seed: int = 0, count: int = 300) -> Tensor:
    """Correlated inputs with channels of different size, float64 (count, width)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    mixed = normal(count, width // 4 + 1) @ normal(width // 4 + 1, width)
    return (mixed + 0.3 * normal(count, width)) * normal(width).exp()


def plain_gptq(
    weight: Tensor,
    hessian: Tensor,
    step: Tensor,
    zero: Tensor,
    chosen: IntegerGrid,
    activation_order: bool,
) -> Tensor:
    """GPTQ as optimal brain quantization has it: column by column, all float64, no blocks.

    When column j is rounded, the later columns F minimise the output error left if
    w_F ← w_F − (w_j − ŵ_j) / [H_R⁻¹]_jj · [H_R⁻¹]_jF, with R = {j} ∪ F the columns not yet
    rounded; H_R⁻¹ is computed anew at every column.
    """
    hessian, weight = hessian.clone(), weight.double().clone()
    width = len(hessian)
    for k in range(width):
        if hessian[k, k] == 0:
            hessian[k, k] = 1
            weight[:, k] = 0
    columns = list(range(width))
    if activation_order:
        columns.sort(key=lambda k: -hessian[k, k].item())
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(width, dtype=torch.float64)
    codes = torch.zeros_like(weight)
    while columns:
        j, later = columns[0], columns[1:]
        inverse = torch.linalg.inv(hessian[columns][:, columns])
        rounded = (weight[:, j] / step[:, j]).round() + zero[:, j]
        codes[:, j] = rounded.clamp(chosen.lowest, chosen.highest)
        error = weight[:, j] - (codes[:, j] - zero[:, j]) * step[:, j]
        weight[:, later] -= torch.outer(error / inverse[0, 0], inverse[0, 1:])
        columns = later
    return codes.to(torch.int8)


def output_error(weight: Tensor, rounded: QuantizedWeight, hessian: Tensor) -> float:
    """Σ_t ‖(W − Ŵ) x_t‖²."""
    difference = weight.double() - rounded.dequantize(torch.float64)
    return torch.einsum("nk,kl,nl->", difference, hessian, difference).item()


class TestGptq:
    @each_kind
    @each_clip
    @pytest.mark.parametrize("activation_order", [False, True], ids=["in order", "by activation"])
    @pytest.mark.parametrize("block_size", [1, 16, 128])
    def test_the_plain_algorithm(
        self, kind: str, clip: bool, activation_order: bool, block_size: int
    ) -> None:
        weight, x = matrix(7), tokens(WIDTH)
        chosen = grid(kind, clip=clip)
        settings = Gptq(activation_order=activation_order)
        found = gptq(weight, factorise(x.t() @ x, settings, "site"), chosen, block_size)
        step, zero = lattice(chosen.find_scales(weight))
        assert all(map(torch.equal, lattice(found.scales), (step, zero)))
        expected = plain_gptq(weight, x.t() @ x, step, zero, chosen, activation_order)
        assert torch.equal(found.codes, expected)
        assert not torch.equal(found.codes, round_to_nearest(weight, chosen).codes)

    @pytest.mark.parametrize("activation_order", [False, True], ids=["in order", "by activation"])
    @pytest.mark.parametrize("width", [1, 2, 37, 130])
    def test_a_width_that_is_no_multiple_of_the_block(
        self, width: int, activation_order: bool
    ) -> None:
        weight, x = matrix(3, width), tokens(width)
        chosen = grid("channel", width=width)
        factor = factorise(x.t() @ x, Gptq(activation_order=activation_order), "site")
        step = chosen.find_scales(weight).step_by_column(width, torch.float64)
        zero = torch.zeros_like(step)
        expected = plain_gptq(weight, x.t() @ x, step, zero, chosen, activation_order)
        for block_size in (1, 16, 128):
            assert torch.equal(gptq(weight, factor, chosen, block_size).codes, expected)

    @each_kind_and_width
    @pytest.mark.parametrize("activation_order", [False, True], ids=["in order", "by activation"])
    def test_the_output_error_is_below_round_to_nearests(
        self, kind: str, bits: int, activation_order: bool
    ) -> None:
        weight, x = matrix(16), tokens(WIDTH)
        hessian = x.t() @ x
        factor = factorise(hessian, Gptq(activation_order=activation_order), "site")
        nearest = output_error(weight, round_to_nearest(weight, grid(kind, bits)), hessian)
        found = output_error(weight, gptq(weight, factor, grid(kind, bits), 16), hessian)
        assert found <= nearest

    def test_on_uncorrelated_inputs_it_is_round_to_nearest(self) -> None:
        weight = matrix(9)
        hessian = torch.rand(WIDTH, generator=torch.Generator().manual_seed(0)).add(0.1)
        factor = factorise(torch.diag(hessian.double()), Gptq(), "site")
        found = gptq(weight, factor, grid("channel"), 16)
        assert torch.equal(found.codes, round_to_nearest(weight, grid("channel")).codes)

    @each_kind
    @pytest.mark.parametrize("activation_order", [False, True], ids=["in order", "by activation"])
    def test_channels_that_no_token_reaches_get_zero_codes(
        self, kind: str, activation_order: bool
    ) -> None:
        weight, x = matrix(7), tokens(WIDTH) * 0.01  # a dead channel's 1 counts in the damping
        dead = [0, 13, 47]
        x[:, dead] = 0
        weight[:, dead] = 5.0  # and they do not set the scale
        chosen = grid(kind)
        factor = factorise(x.t() @ x, Gptq(activation_order=activation_order), "site")
        found = gptq(weight, factor, chosen, 16)
        assert not found.dequantize()[:, dead].any()
        weight[:, dead] = 0
        step, zero = lattice(chosen.find_scales(weight))
        assert all(map(torch.equal, lattice(found.scales), (step, zero)))
        expected = plain_gptq(weight, x.t() @ x, step, zero, chosen, activation_order)
        assert torch.equal(found.codes, expected)

    def test_neither_weight_nor_hessian_is_written_to(self) -> None:
        weight, x = matrix(7), tokens(WIDTH)
        x[:, 3] = 0
        hessian = x.t() @ x
        before = weight.clone(), hessian.clone()
        gptq(weight, factorise(hessian, Gptq(), "site"), grid("channel"), 16)
        assert torch.equal(weight, before[0])
        assert torch.equal(hessian, before[1])

    def test_half_precision_weights_are_their_float32_copy(self) -> None:
        weight, x = matrix(7).bfloat16(), tokens(WIDTH)
        factor = factorise(x.t() @ x, Gptq(), "site")
        half = gptq(weight, factor, grid("channel"), 16)
        single = gptq(weight.float(), factor, grid("channel"), 16)
        assert torch.equal(half.codes, single.codes)
        assert torch.equal(half.scales.scale, single.scales.scale)


def indefinite(excess: float) -> Tensor:
    """A symmetric matrix of unit diagonal whose smallest eigenvalue is −excess."""
    hessian = torch.eye(4, dtype=torch.float64)
    hessian[0, 1] = hessian[1, 0] = 1 + excess
    return hessian


class TestDamping:
    def test_the_factor_is_of_the_damped_inverse(self) -> None:
        x = tokens(9)
        hessian = x.t() @ x
        upper = inverse_factor(hessian, 0.01, "site")
        damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(9, dtype=torch.float64)
        assert torch.equal(upper, upper.triu())
        identity = torch.eye(9, dtype=torch.float64)
        assert torch.allclose(damped @ upper.t() @ upper, identity, atol=1e-9)

    def test_a_hessian_that_is_not_positive_definite_raises_damping_by_name(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        with caplog.at_level(logging.WARNING, logger="smoothq"):
            found = factorise(indefinite(0.05), Gptq(damping=0.001), "layers.3.mlp.down_proj")
        assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
        for record, damping in zip(caplog.records, ("0.01", "0.1"), strict=True):
            assert "layers.3.mlp.down_proj" in record.message
            assert record.message.endswith(f"damping raised to {damping}")
        expected = factorise(indefinite(0.05), Gptq(damping=0.1), "site")
        assert torch.allclose(found.upper, expected.upper, rtol=1e-12)

    def test_fewer_tokens_than_channels_need_the_damping(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        x = tokens(WIDTH, count=3)
        with caplog.at_level(logging.WARNING, logger="smoothq"):
            usual = factorise(x.t() @ x, Gptq(), "site")
            assert not caplog.records
            tiny = factorise(x.t() @ x, Gptq(damping=1e-22), "layers.0.qkv")
        assert "layers.0.qkv" in caplog.text
        for factor in (usual, tiny):
            assert bool(factor.upper.isfinite().all())

    def test_a_healthy_hessian_says_nothing(self, caplog: pytest.LogCaptureFixture) -> None:
        x = tokens(WIDTH)
        factorise(x.t() @ x, Gptq(), "site")
        assert not caplog.records

    @pytest.mark.parametrize("at", [(2, 2), (1, 2), (0, 3)])
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_a_hopeless_hessian_is_refused_by_name(self, at: tuple[int, int], value: float) -> None:
        hessian = torch.eye(4, dtype=torch.float64)
        hessian[at] = hessian[at[::-1]] = value
        with pytest.raises(NumericsError, match=r"layers\.0\.qkv"):
            factorise(hessian, Gptq(), "layers.0.qkv")

    def test_damping_has_an_end(self) -> None:
        with pytest.raises(NumericsError, match="site"):
            factorise(indefinite(100.0), Gptq(), "site")


class TestPacking:
    @pytest.mark.parametrize(("bits", "lowest", "highest"), [(4, -8, 7), (8, -128, 127)])
    @pytest.mark.parametrize("columns", [1, 2, 7, 16, 33])
    def test_round_trip(self, bits: int, lowest: int, highest: int, columns: int) -> None:
        every = torch.arange(lowest, highest + 1).repeat(columns)
        codes = every.reshape(columns, -1).t().contiguous().to(torch.int8)
        packed = pack(codes, bits)
        assert packed.is_contiguous()
        found = unpack(packed, columns, bits)
        assert found.dtype == torch.int8
        assert torch.equal(found, codes)
        like = packed_like(*codes.shape, bits)
        assert (packed.shape, packed.dtype) == (like.shape, like.dtype)

    @FEW
    @given(seeds, st.integers(1, 9), st.integers(1, 200), st.sampled_from([4, 8]))
    def test_any_codes(self, seed: int, rows: int, columns: int, bits: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        limit = 2 ** (bits - 1)
        codes = torch.randint(-limit, limit, (rows, columns), generator=generator).to(torch.int8)
        assert torch.equal(unpack(pack(codes, bits), columns, bits), codes)

    def test_the_first_half_of_a_block_is_in_the_low_nibbles(self) -> None:
        codes = torch.tensor([[1, 2, -1], [-8, 7, 0]], dtype=torch.int8)
        assert pack(codes, 4).tolist() == [[0xF1, 0x02], [0x08, 0x07]]
        whole = torch.zeros(1, 66, dtype=torch.int8)
        whole[0, [0, 31, 32, 63, 64, 65]] = torch.tensor([1, 2, 3, 4, 5, 6], dtype=torch.int8)
        packed = pack(whole, 4)[0].tolist()
        assert (packed[0], packed[31], packed[32]) == (0x31, 0x42, 0x65)

    @pytest.mark.parametrize("bits", [4, 8])
    @pytest.mark.parametrize("columns", [2, 7, 16])
    def test_a_dense_layer_refuses_packed_codes(self, bits: int, columns: int) -> None:
        dense = nn.Linear(columns, 3, bias=False)
        packed = pack(torch.ones(3, columns, dtype=torch.int8), bits)
        with pytest.raises(RuntimeError, match="size mismatch for weight"):
            dense.load_state_dict({"weight": packed})
