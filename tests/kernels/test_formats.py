"""Number formats of a few bits against decoders that others wrote: every code, and any value."""

import ml_dtypes
import numpy as np
import pytest
import torch
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from smoothq.kernels import formats, reference
from smoothq.kernels.formats import E2M1, E4M3, FloatFormat

BYTES = torch.arange(256, dtype=torch.int32).to(torch.uint8)
NIBBLES = BYTES[:16]
MANY = settings(max_examples=200, deadline=None, derandomize=True)

float32s = st.lists(st.floats(width=32), min_size=1, max_size=16).map(torch.tensor)
each_format = pytest.mark.parametrize("form", [E2M1, E4M3], ids=lambda form: form.name)


def numbers_of(codes: Tensor, dtype: type) -> Tensor:
    """The values that ml_dtypes reads from bytes, a code each."""
    return torch.from_numpy(codes.numpy().view(dtype).astype(np.float32))


def values_of(codes: Tensor, form: FloatFormat) -> Tensor:
    return form.values(form.ranks_of(codes).float())


def nearest(x: Tensor, form: FloatFormat) -> Tensor:
    return form.values(form.ranks(x))


def equal(found: Tensor, expected: Tensor) -> bool:
    return torch.equal(found.isnan(), expected.isnan()) and torch.equal(
        found.nan_to_num(0.0), expected.nan_to_num(0.0)
    )


class TestE4M3:
    def test_every_byte(self) -> None:
        values = formats.e4m3_values(BYTES)
        assert equal(values, BYTES.view(torch.float8_e4m3fn).float())
        assert equal(values, numbers_of(BYTES, ml_dtypes.float8_e4m3fn))

    def test_every_value_has_its_byte(self) -> None:
        bytes_again = formats.e4m3_bytes(formats.e4m3_values(BYTES))
        negative_zero, nan = BYTES == 0x80, BYTES & 0x7F == 0x7F
        expected = torch.where(nan, 0x7F, torch.where(negative_zero, 0, BYTES))
        assert torch.equal(bytes_again, expected.to(torch.uint8))

    @MANY
    @given(float32s)
    def test_any_value_is_rounded_as_pytorch_rounds_it(self, x: Tensor) -> None:
        bounded = x.clamp(-E4M3.largest, E4M3.largest)
        assert equal(nearest(x, E4M3), bounded.to(torch.float8_e4m3fn).float())

    @MANY
    @given(float32s)
    def test_any_value_is_rounded_as_ml_dtypes_rounds_it(self, x: Tensor) -> None:
        bounded = x.clamp(-E4M3.largest, E4M3.largest).numpy()
        expected = bounded.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
        assert equal(nearest(x, E4M3), torch.from_numpy(expected))

    def test_nan_is_no_number(self) -> None:
        assert formats.e4m3_bytes(torch.tensor([torch.nan])).item() == 0x7F


class TestE2M1:
    def test_every_code(self) -> None:
        assert equal(values_of(NIBBLES, E2M1), numbers_of(NIBBLES, ml_dtypes.float4_e2m1fn))

    def test_every_pair_as_compressed_tensors_reads_it(self) -> None:
        theirs = unpack_fp4_from_uint8(BYTES, 1, 512, torch.float32).flatten()
        ours = values_of(torch.stack([BYTES & 15, BYTES >> 4], 1).flatten(), E2M1)
        assert equal(ours, theirs)

    @MANY
    @given(float32s)
    def test_any_value_is_rounded_as_ml_dtypes_rounds_it(self, x: Tensor) -> None:
        x = x.nan_to_num(0.0)  # E2M1 has no NaN
        expected = x.numpy().astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
        assert equal(nearest(x, E2M1), torch.from_numpy(expected))


class TestBothFormats:
    @each_format
    def test_ranks_are_in_the_order_of_values(self, form: FloatFormat) -> None:
        ranks = torch.arange(-form.highest, form.highest + 1)
        values = form.values(ranks.float())
        assert (values.diff() > 0).all()
        assert values[-1] == form.largest
        assert torch.equal(form.ranks(values), ranks.float())

    @each_format
    def test_half_way_between_two_values_the_even_code_is_taken(self, form: FloatFormat) -> None:
        ranks = torch.arange(form.highest)
        middle = (form.values(ranks.float()) + form.values(ranks + 1.0)) / 2
        even = torch.where(ranks % 2 == 0, ranks, ranks + 1)
        assert torch.equal(form.ranks(middle), even.float())
        assert torch.equal(form.ranks(-middle), -even.float())

    @each_format
    def test_codes_and_ranks_are_inverse(self, form: FloatFormat) -> None:
        ranks = torch.arange(-form.highest, form.highest + 1, dtype=torch.int8)
        assert torch.equal(form.ranks_of(form.codes(ranks)), ranks)

    @each_format
    def test_signs_of_zero_and_nan_stay(self, form: FloatFormat) -> None:
        rounded = nearest(torch.tensor([-0.0, 0.0, -1e-9, torch.nan]), form)
        assert rounded.signbit()[:3].tolist() == [True, False, True]
        assert rounded.isnan().tolist() == [False, False, False, True]

    @each_format
    def test_what_is_too_large_becomes_the_largest(self, form: FloatFormat) -> None:
        assert nearest(torch.tensor([1e30, torch.inf]), form).tolist() == [form.largest] * 2


class TestE8M0:
    def test_every_byte(self) -> None:
        values = formats.powers_of_two(BYTES)
        assert equal(values, BYTES.view(torch.float8_e8m0fnu).float())
        assert equal(values, numbers_of(BYTES, ml_dtypes.float8_e8m0fnu))

    @each_format
    @MANY
    @given(maximum=st.floats(2.0**-100, 2.0**100, width=32))
    def test_the_largest_of_a_group_is_in_the_binade_of_the_largest_value(
        self, form: FloatFormat, maximum: float
    ) -> None:
        scale = formats.powers_of_two(formats.power_of_two(torch.tensor([maximum]), form)).item()
        assert 2.0**form.exponent <= maximum / scale < 2.0 ** (form.exponent + 1)

    @each_format
    def test_zero_nan_infinity_and_the_ends(self, form: FloatFormat) -> None:
        maxima = torch.tensor([0.0, torch.nan, torch.inf, 2.0**-149, 3e38])
        codes = formats.power_of_two(maxima, form)
        assert codes.tolist() == [127, 255, 255, 0, 254 - form.exponent]


class TestProductsOfGgufBlocks:
    """gguf's blocks hold the same codes and scales, a group after the other."""

    def test_mxfp4(self) -> None:
        generator = torch.Generator().manual_seed(0)
        scales = torch.randint(0, 252, (254, 1), generator=generator, dtype=torch.uint8)
        codes = torch.randint(0, 16, (254, 32), generator=generator, dtype=torch.uint8)
        blocks = torch.cat([scales, codes[:, :16] | (codes[:, 16:] << 4)], 1).numpy()
        theirs = torch.from_numpy(dequantize(blocks, GGMLQuantizationType.MXFP4))
        ours = values_of(codes, E2M1) * reference.fp_scales(scales, None)
        assert equal(ours, theirs.reshape(ours.shape))

    def test_nvfp4(self) -> None:
        generator = torch.Generator().manual_seed(0)
        scales = torch.randint(0, 0x7F, (64, 4), generator=generator, dtype=torch.uint8)
        codes = torch.randint(0, 16, (64, 4, 16), generator=generator, dtype=torch.uint8)
        pairs = (codes[..., :8] | (codes[..., 8:] << 4)).flatten(1)
        theirs = dequantize(torch.cat([scales, pairs], 1).numpy(), GGMLQuantizationType.NVFP4)
        steps = reference.fp_scales(scales, torch.ones(1)).unsqueeze(-1)
        ours = (values_of(codes, E2M1) * steps).flatten(1)
        assert equal(ours, torch.from_numpy(theirs).reshape(ours.shape))


class TestWords:
    @pytest.mark.parametrize("bits", range(2, 9))
    @pytest.mark.parametrize("columns", [1, 5, 10, 31, 32, 33, 64, 97, 576])
    def test_they_are_compressed_tensors(self, bits: int, columns: int) -> None:
        generator = torch.Generator().manual_seed(columns)
        half = 2 ** (bits - 1)
        codes = torch.randint(-half, half, (3, columns), generator=generator).to(torch.int8)
        words = pack_to_int32(codes, bits)
        assert torch.equal(reference.unpack_words(words, columns, bits), codes)

    @pytest.mark.parametrize("bits", range(2, 9))
    @MANY
    @given(words=st.lists(st.integers(-(2**31), 2**31 - 1), min_size=9, max_size=9))
    def test_any_words_mean_what_compressed_tensors_reads(
        self, bits: int, words: list[int]
    ) -> None:
        packed, columns = torch.tensor([words], dtype=torch.int32), 9 * 32 // bits
        theirs = unpack_from_int32(packed, bits, torch.Size((1, columns)))
        assert torch.equal(reference.unpack_words(packed, columns, bits), theirs)
