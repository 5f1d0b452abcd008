"""The quantizers of smoothq.kernels, held to their definitions written out in float64.

A kernel computes in float32: its code may differ from the definition's by one, and only where
the exact quotient lies within NEAR_TIE of halfway between two codes.
"""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from smoothq import kernels

NEAR_TIE = 1e-4
live_channel_maxima = kernels.reference.live_channel_maxima
FEW = settings(max_examples=20, deadline=None, derandomize=True)

seeds = st.integers(0, 2**32 - 1)
widths = st.sampled_from([4, 8])
multiplied_widths = st.sampled_from([4, 5, 6])
clips = st.sampled_from([1.0, 0.9, 0.5])
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
token_counts = st.integers(1, 7)
finite = st.floats(width=32, min_value=-(2.0**99), max_value=2.0**99)
tokens_of_8 = st.lists(st.lists(finite, min_size=8, max_size=8), min_size=1, max_size=5)

# Every quantizer whose codes of a token depend on that token alone, for inputs of 24 channels.
CHANNEL_MULTIPLIER = torch.tensor([15, 1, 2, 5, 7, 11] * 4, dtype=torch.int8)
TOKEN_BY_TOKEN: dict[str, Callable[[Tensor, int], kernels.QuantizedInput]] = {
    "per token": kernels.quantize_per_token,
    "per token, clipped": lambda x, bits: kernels.quantize_per_token(x, bits, 0.5),
    "per token, full range": lambda x, bits: kernels.quantize_per_token(x, bits, full_range=True),
    "token groups": lambda x, bits: kernels.quantize_token_groups(x, bits, 8),
    "token groups, clipped": lambda x, bits: kernels.quantize_token_groups(x, bits, 4, 0.5),
    "smoothed": lambda x, bits: kernels.quantize_smoothed(x, _channel_multiplier(x, bits), bits),
    "static": lambda x, bits: kernels.static_quantize(x, torch.tensor(0.37), bits),
}
WITH_MULTIPLIER = {"token groups", "token groups, clipped", "smoothed"}
each_quantizer = pytest.mark.parametrize("name", TOKEN_BY_TOKEN)
at_each_width = pytest.mark.parametrize(
    ("name", "bits"),
    [(name, bits) for name in TOKEN_BY_TOKEN for bits in (4, 6 if name in WITH_MULTIPLIER else 8)],
)


def _channel_multiplier(x: Tensor, bits: int) -> Tensor:
    multiplier = CHANNEL_MULTIPLIER[: x.shape[-1]]
    return multiplier.clamp(max=kernels.largest_multiplier(bits))


def activations(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Gaussian values with large and small channels, and large and small tokens."""
    generator = torch.Generator().manual_seed(seed)
    channels = torch.randn(shape[-1], generator=generator).exp()
    tokens = torch.randn(*shape[:-1], 1, generator=generator).exp()
    return (torch.randn(*shape, generator=generator) * channels * tokens).to(dtype)


def agree(codes: Tensor, quotient: Tensor, lowest: int, highest: int) -> bool:
    """Whether codes are the float64 quotient rounded and clamped, but for near ties."""
    expected = quotient.round().clamp(lowest, highest)
    tie = (quotient - quotient.floor() - 0.5).abs() < NEAR_TIE
    off = (codes.double() - expected).abs()
    return bool(((off == 0) | (tie & (off == 1))).all())


def multiples_agree(codes: Tensor, quotient: Tensor, multiplier: Tensor | int, bits: int) -> bool:
    """The same for codes with a multiplier in them: whole multiples of it."""
    highest = 2 ** (bits - 1) - 1
    whole = bool((codes.long() % multiplier == 0).all())
    return whole and agree(codes.double() / multiplier, quotient, -highest - 1, highest)


class TestPerToken:
    @FEW
    @given(seeds, token_counts, st.integers(1, 33), widths, clips, dtypes)
    def test_definition(
        self, seed: int, tokens: int, width: int, bits: int, clip: float, dtype: torch.dtype
    ) -> None:
        x = activations(tokens, width, seed=seed, dtype=dtype)
        codes, scale, block_scale, order = kernels.quantize_per_token(x, bits, clip)
        assert codes.dtype == torch.int8
        assert scale.dtype == torch.float32
        assert scale.shape == (tokens, 1)
        assert block_scale is None
        assert order is None
        highest = 2 ** (bits - 1) - 1
        for t in range(tokens):
            row = x[t].double()
            step = clip * max(abs(value) for value in row.tolist()) / highest
            assert scale[t].item() == pytest.approx(step, rel=1e-6)
            assert agree(codes[t], row / step, -highest - 1, highest)

    @FEW
    @given(seeds, widths)
    def test_without_clipping_no_value_moves_by_more_than_half_a_step(
        self, seed: int, bits: int
    ) -> None:
        x = activations(5, 24, seed=seed)
        codes, scale, *_ = kernels.quantize_per_token(x, bits)
        error = (x.double() - codes.double() * scale.double()).abs()
        assert bool((error <= scale.double() / 2 * (1 + 1e-5)).all())

    def test_the_lowest_code_is_reached_by_clipping_only(self) -> None:
        x = torch.tensor([[-1.0, 0.4, 1.0]])
        assert kernels.quantize_per_token(x, 4).codes.tolist() == [[-7, 3, 7]]
        assert kernels.quantize_per_token(x, 4, 0.5).codes.tolist() == [[-8, 6, 7]]
        assert kernels.quantize_per_token(x, 8, 0.5).codes.tolist() == [[-128, 102, 127]]

    @FEW
    @given(seeds, token_counts, st.integers(1, 33), widths, clips, dtypes)
    def test_full_range(
        self, seed: int, tokens: int, width: int, bits: int, clip: float, dtype: torch.dtype
    ) -> None:
        x = activations(tokens, width, seed=seed, dtype=dtype)
        codes, scale, *_ = kernels.quantize_per_token(x, bits, clip, full_range=True)
        lowest = -(2 ** (bits - 1))
        for t in range(tokens):
            row = x[t].double()
            step = clip * max(row.tolist(), key=lambda value: (abs(value), -value)) / lowest
            assert scale[t].item() == pytest.approx(step, rel=1e-6)
            assert agree(codes[t], row / step, lowest, -lowest - 1)

    def test_full_range_brings_the_largest_value_to_the_lowest_code(self) -> None:
        x = torch.tensor([[8.0, -8.0, 4.0], [8.0, -7.0, 4.0]])
        codes, scale, *_ = kernels.quantize_per_token(x, 4, full_range=True)
        assert codes.tolist() == [[7, -8, 4], [-8, 7, -4]]
        assert scale.flatten().tolist() == [1.0, -1.0]

    def test_one_huge_outlier_rounds_its_own_token_to_nothing_and_no_other(self) -> None:
        x = torch.ones(3, 24)
        x[1, 5] = -1e4
        codes = kernels.quantize_per_token(x, 4).codes
        assert codes[0].tolist() == codes[2].tolist() == [7] * 24
        assert codes[1].tolist() == [0] * 5 + [-7] + [0] * 18


class TestPerTensor:
    @FEW
    @given(seeds, token_counts, widths, clips, dtypes)
    def test_definition(
        self, seed: int, tokens: int, bits: int, clip: float, dtype: torch.dtype
    ) -> None:
        x = activations(2, tokens, 9, seed=seed, dtype=dtype)
        codes, scale, *_ = kernels.quantize_per_tensor(x, bits, clip)
        assert scale.shape == (1, 1, 1)
        highest = 2 ** (bits - 1) - 1
        step = clip * max(abs(value) for value in x.double().flatten().tolist()) / highest
        assert scale.item() == pytest.approx(step, rel=1e-6)
        assert agree(codes, x.double() / step, -highest - 1, highest)

    def test_all_zeros(self) -> None:
        codes, scale, *_ = kernels.quantize_per_tensor(torch.zeros(3, 4), 8)
        assert not codes.any()
        assert 0 < scale.item() < math.inf


class TestStatic:
    @FEW
    @given(seeds, token_counts, widths, dtypes, st.floats(1e-3, 10))
    def test_definition(
        self, seed: int, tokens: int, bits: int, dtype: torch.dtype, step: float
    ) -> None:
        x = activations(tokens, 9, seed=seed, dtype=dtype)
        given_scale = torch.tensor(step)
        codes, scale, *_ = kernels.static_quantize(x, given_scale, bits)
        assert scale.shape == (1, 1)
        assert scale.item() == given_scale.item()
        highest = 2 ** (bits - 1) - 1
        quotient = x.double() / given_scale.double()
        # Far outside the grid the quotient's last bits are no matter of codes.
        assert agree(codes, quotient.clamp(-highest - 2, highest + 1), -highest - 1, highest)

    def test_values_beyond_the_calibrated_maximum_saturate(self) -> None:
        x = torch.tensor([[-1e30, 1e30, -8.0, 0.0]])
        codes = kernels.static_quantize(x, torch.tensor(1.0), 4).codes
        assert codes.tolist() == [[-8, 7, -8, 0]]


class TestTokenGroups:
    @FEW
    @given(seeds, token_counts, st.sampled_from([1, 2, 3, 8, 24]), multiplied_widths, clips, dtypes)
    def test_definition(
        self, seed: int, tokens: int, size: int, bits: int, clip: float, dtype: torch.dtype
    ) -> None:
        x = activations(tokens, 24, seed=seed, dtype=dtype)
        codes, scale, *_ = kernels.quantize_token_groups(x, bits, size, clip)
        assert codes.dtype == torch.int8
        assert scale.shape == (tokens, 1)
        largest = min(8, 127 // 2 ** (bits - 1))
        for t in range(tokens):
            groups = x[t].double().split(size)
            extremes = [
                max(group.tolist(), key=lambda value: (abs(value), -value)) for group in groups
            ]
            base = clip * max(abs(extreme) for extreme in extremes) / largest
            step = base / 2 ** (bits - 1)
            assert scale[t].item() == pytest.approx(step, rel=1e-6)
            for group, extreme, found in zip(groups, extremes, codes[t].split(size), strict=True):
                ratio = clip * abs(extreme) / base
                ratios = (ratio - NEAR_TIE, ratio, ratio + NEAR_TIE)
                sign = -1 if extreme > 0 else 1
                possible = {sign * min(max(math.ceil(ratio), 1), largest) for ratio in ratios}
                assert any(multiples_agree(found, group / (m * step), m, bits) for m in possible)

    @FEW
    @given(seeds, st.sampled_from([1, 4, 12]), multiplied_widths)
    def test_without_clipping_the_largest_value_of_a_group_moves_by_half_a_step_at_most(
        self, seed: int, size: int, bits: int
    ) -> None:
        x = activations(5, 24, seed=seed)
        codes, scale, *_ = kernels.quantize_token_groups(x, bits, size)
        lowest, largest = 2 ** (bits - 1), kernels.largest_group_multiplier(bits)
        groups = x.double().unflatten(-1, (-1, size))
        maxima, where = groups.abs().max(-1, keepdim=True)
        base = maxima.amax(-2, keepdim=True) / largest
        step = (maxima / base - 1e-6).ceil().clamp(1, largest) * base / lowest
        error = (groups - (codes.double() * scale.double()).unflatten(-1, (-1, size))).abs()
        assert bool((error.gather(-1, where) <= step / 2 * (1 + 1e-5)).all())
        # A value as large of the other sign lacks the code that the largest has.
        assert bool((error <= step * (1 + 1e-5)).all())

    def test_the_largest_value_takes_the_lowest_code_whatever_its_sign(self) -> None:
        x = torch.tensor([[4.0, -1.0, 1.0, 1.0], [-4.0, 1.0, -1.0, -1.0]])
        codes, scale, *_ = kernels.quantize_token_groups(x, 4, 4)
        assert codes.tolist() == [[64, -16, 16, 16], [-64, 16, -16, -16]]
        assert scale.flatten().tolist() == pytest.approx([4 / 64, 4 / 64])

    def test_an_outlier_costs_the_other_groups_an_eighth_of_its_grid(self) -> None:
        x = torch.ones(1, 16)
        x[0, 3] = -50.0
        plain = kernels.quantize_per_token(x, 4)
        groups = kernels.quantize_token_groups(x, 4, 4)
        assert not plain.codes[0, 4:].any()
        assert groups.codes[0].tolist() == [0, 0, 0, -64] + [1] * 12
        assert groups.scale.item() == pytest.approx(50 / 64)


class TestChannelMultipliers:
    @FEW
    @given(seeds, st.integers(1, 40), multiplied_widths)
    def test_the_least_integer_that_covers_each_scale(
        self, seed: int, width: int, bits: int
    ) -> None:
        scale = activations(width, seed=seed).abs() + 1e-3
        multiplier = kernels.channel_multipliers(scale, bits)
        assert multiplier.dtype == torch.int8
        largest = 127 // 2 ** (bits - 1)
        values = scale.double().tolist()
        base = max(values) / largest
        for value, m in zip(values, multiplier.tolist(), strict=True):
            assert 1 <= m <= largest
            assert m * base >= value * (1 - 1e-6)
            assert m == 1 or (m - 1) * base <= value * (1 + 1e-6)

    def test_dead_channels_get_one(self) -> None:
        assert kernels.channel_multipliers(torch.tensor([0.0, 9.0]), 4).tolist() == [1, 15]
        assert kernels.channel_multipliers(torch.tensor([0.0, 0.0]), 4).tolist() == [15, 15]

    def test_8_bits_leave_room_for_none(self) -> None:
        with pytest.raises(ValueError, match="8-bit codes leave an int8 no room"):
            kernels.channel_multipliers(torch.tensor([0.1, 9.0]), 8)


class TestSmoothed:
    @FEW
    @given(seeds, token_counts, clips, dtypes)
    def test_definition(self, seed: int, tokens: int, clip: float, dtype: torch.dtype) -> None:
        x = activations(tokens, 24, seed=seed, dtype=dtype)
        codes, scale, *_ = kernels.quantize_smoothed(x, CHANNEL_MULTIPLIER, 4, clip)
        assert codes.dtype == torch.int8
        assert scale.shape == (tokens, 1)
        for t in range(tokens):
            smoothed = x[t].double() / CHANNEL_MULTIPLIER
            step = clip * max(abs(value) for value in smoothed.tolist()) / 7
            assert scale[t].item() == pytest.approx(step, rel=1e-6)
            assert multiples_agree(codes[t], smoothed / step, CHANNEL_MULTIPLIER, 4)

    def test_without_clipping_no_value_moves_by_more_than_half_its_channels_step(self) -> None:
        x = activations(7, 24)
        codes, scale, *_ = kernels.quantize_smoothed(x, CHANNEL_MULTIPLIER, 4)
        error = (x.double() - codes.double() * scale.double()).abs()
        assert bool((error <= scale.double() * CHANNEL_MULTIPLIER / 2 * (1 + 1e-5)).all())


class TestEveryTokenAlone:
    @at_each_width
    def test_a_batch_is_its_tokens_to_the_last_bit(self, name: str, bits: int) -> None:
        quantize = TOKEN_BY_TOKEN[name]
        x = activations(3, 7, 24)
        together = quantize(x, bits)
        scale = together.scale.expand(3, 7, 1)
        for b in range(3):
            for t in range(7):
                alone = quantize(x[b, t], bits)
                assert torch.equal(together.codes[b, t], alone.codes)
                assert torch.equal(scale[b, t], alone.scale)

    @each_quantizer
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_input_is_its_float32_copy(self, name: str, dtype: torch.dtype) -> None:
        x = activations(5, 24, dtype=dtype)
        half, single = TOKEN_BY_TOKEN[name](x, 4), TOKEN_BY_TOKEN[name](x.float(), 4)
        assert torch.equal(half.codes, single.codes)
        assert torch.equal(half.scale, single.scale)

    @at_each_width
    def test_zero_tokens_get_zero_codes_and_a_usable_scale(self, name: str, bits: int) -> None:
        x = activations(3, 24)
        x[1] = 0
        codes, scale, *_ = TOKEN_BY_TOKEN[name](x, bits)
        assert not codes[1].any()
        assert codes[0].any()
        assert codes[2].any()
        assert bool(((scale != 0) & scale.isfinite()).all())

    @at_each_width
    @FEW
    @given(rows=tokens_of_8)
    def test_any_finite_input_gives_codes_in_range_of_the_right_sign(
        self, name: str, bits: int, rows: list[list[float]]
    ) -> None:
        x = torch.tensor(rows)
        codes, scale, *_ = TOKEN_BY_TOKEN[name](x, bits)
        assert bool(((scale != 0) & scale.isfinite()).all())
        assert bool((codes.float() * scale.sign() * x.sign() >= 0).all())
        if name in WITH_MULTIPLIER:
            assert codes.abs().max().item() <= kernels.largest_multiplier(bits) * 2 ** (bits - 1)
        else:
            assert -(2 ** (bits - 1)) <= codes.min().item()
            assert codes.max().item() < 2 ** (bits - 1)

    def test_a_token_with_only_denormal_values_keeps_a_positive_scale(self) -> None:
        for ulps in range(1, 130):
            x = torch.tensor([[ulps * 2.0**-149, 0.0]])
            scale = kernels.quantize_token_groups(x, 4, 2).scale
            assert scale.item() > 0


class TestLive:
    """Runtime smoothing as the paper has it (arXiv 2409.20361): scales over the sequence."""

    def test_by_hand(self) -> None:
        x = torch.tensor([[[1.0, -8.0, 2.0, 0.4], [0.0, 6.0, -3.0, 0.9]]])
        codes, scale, block_scale, order = kernels.runtime_smooth_quantize(x, 4, 2)
        # Maxima 1, 8, 3, 0.9 → channels 1, 2 | 0, 3 with the divisors 8 | 1.
        assert order is not None
        assert block_scale is not None
        assert order.tolist() == [[1, 2, 0, 3]]
        assert block_scale.tolist() == [[8.0, 1.0]]
        # Token 0: −1, 0.25 | 1, 0.4, largest 1. Token 1: 0.75, −0.375 | 0, 0.9, largest 0.9.
        assert codes.tolist() == [[[-7, 2, 7, 3], [6, -3, 0, 7]]]
        assert scale.flatten().tolist() == pytest.approx([1 / 7, 0.9 / 7])

    @FEW
    @given(
        seeds,
        token_counts,
        st.sampled_from([2, 3, 8, 24]),
        widths,
        clips,
        dtypes,
        st.booleans(),
        st.booleans(),
    )
    def test_definition(
        self,
        seed: int,
        length: int,
        size: int,
        bits: int,
        clip: float,
        dtype: torch.dtype,
        masked: bool,
        normalise: bool,
    ) -> None:
        x = activations(2, length, 24, seed=seed, dtype=dtype)
        mask = torch.ones(2, length, dtype=torch.bool)
        mask[1, : length // 2] = not masked
        codes, scale, block_scale, order = kernels.runtime_smooth_quantize(
            x, bits, size, clip, mask if masked else None, normalise
        )
        assert block_scale is not None
        assert order is not None
        highest = 2 ** (bits - 1) - 1
        for b in range(2):
            tokens = x[b][mask[b]].double()
            if normalise:
                tokens = tokens / tokens.abs().amax(-1, keepdim=True)
            maxima = [max(abs(value) for value in column) for column in tokens.t().tolist()]
            assert sorted(order[b].tolist()) == list(range(24))
            ordered = [max(maxima[k], 1e-5) for k in order[b].tolist()]
            assert ordered == pytest.approx(sorted(ordered, reverse=True), rel=1e-6)
            groups = [ordered[k : k + size] for k in range(0, 24, size)]
            divisors = [max(group) for group in groups]
            assert block_scale[b].tolist() == pytest.approx(divisors, rel=1e-6)
            divisor = torch.tensor(divisors, dtype=torch.float64).repeat_interleave(size)
            for t in range(length):
                smoothed = x[b, t].double()[order[b]] / divisor
                step = clip * smoothed.abs().max().item() / highest
                assert scale[b, t].item() == pytest.approx(step, rel=1e-6)
                assert agree(codes[b, t], smoothed / step, -highest - 1, highest)

    @pytest.mark.parametrize("normalise", [False, True])
    def test_maxima_are_over_real_tokens_and_never_zero(self, normalise: bool) -> None:
        x = torch.tensor([[[9.0, 9.0, 9.0], [1.0, -4.0, 0.0], [0.0, 2.0, 0.0]]])
        mask = torch.tensor([[False, True, True]])
        maxima = live_channel_maxima(x, mask, normalise)
        expected = [0.25, 1.0, 1e-5] if normalise else [1.0, 4.0, 1e-5]
        assert maxima[0].tolist() == pytest.approx(expected)

    @pytest.mark.parametrize("size", [1, 4])
    @pytest.mark.parametrize("normalise", [False, True])
    def test_padding_moves_nothing(self, size: int, normalise: bool) -> None:
        x = activations(1, 7, 24)
        alone = kernels.runtime_smooth_quantize(x, 4, size, normalise=normalise)
        padded = torch.cat([torch.full((1, 5, 24), 1e6), x], 1)
        mask = torch.arange(12).unsqueeze(0) >= 5
        masked = kernels.runtime_smooth_quantize(padded, 4, size, mask=mask, normalise=normalise)
        assert torch.equal(masked.codes[:, 5:], alone.codes)
        assert torch.equal(masked.scale[:, 5:], alone.scale)
        if size > 1:
            assert torch.equal(masked.block_scale, alone.block_scale)
            assert torch.equal(masked.order, alone.order)

    def test_sequences_of_a_batch_are_independent(self) -> None:
        x = activations(3, 5, 24)
        together = kernels.runtime_smooth_quantize(x, 4, 8)
        for b in range(3):
            alone = kernels.runtime_smooth_quantize(x[b : b + 1], 4, 8)
            for one, many in zip(alone, together, strict=True):
                assert torch.equal(one[0], many[b])

    def test_a_later_token_changes_an_earlier_one(self) -> None:
        x = torch.ones(1, 2, 4)
        before = kernels.runtime_smooth_quantize(x, 4, 2).codes[0, 0]
        x[0, 1, 2] = 50.0
        after = kernels.runtime_smooth_quantize(x, 4, 2).codes[0, 0]
        assert not torch.equal(before, after)

    def test_single_channels_use_integer_multipliers(self) -> None:
        x = activations(2, 5, 24)
        codes, scale, block_scale, order = kernels.runtime_smooth_quantize(x, 4, 1)
        assert block_scale is None
        assert order is None
        for b in range(2):
            multiplier = kernels.channel_multipliers(x[b].abs().amax(0), 4)
            for t in range(5):
                smoothed = x[b, t].double() / multiplier
                step = smoothed.abs().max().item() / 7
                assert scale[b, t].item() == pytest.approx(step, rel=1e-6)
                assert multiples_agree(codes[b, t], smoothed / step, multiplier, 4)

    def test_without_clipping_no_value_moves_by_more_than_half_its_groups_step(self) -> None:
        x = activations(2, 7, 24)
        codes, scale, block_scale, order = kernels.runtime_smooth_quantize(x, 4, 8)
        assert block_scale is not None
        assert order is not None
        step = scale.double() * block_scale.double().repeat_interleave(8, -1).unsqueeze(-2)
        ordered = x.double().gather(-1, order.unsqueeze(-2).expand_as(x))
        error = (ordered - codes.double() * step).abs()
        assert bool((error <= step / 2 * (1 + 1e-5)).all())

    def test_normalised_a_larger_token_weighs_no_more(self) -> None:
        x = activations(1, 7, 24)
        plain = live_channel_maxima(x, None, False)
        normalised = live_channel_maxima(x, None, True)
        sink = x.clone()
        sink[:, 0] *= 100
        assert not torch.allclose(live_channel_maxima(sink, None, False), plain)
        assert torch.allclose(live_channel_maxima(sink, None, True), normalised, rtol=1e-6)
        sink[:, 0] = x[:, 0] * 128  # a power of two scales without rounding
        assert torch.equal(live_channel_maxima(sink, None, True), normalised)
