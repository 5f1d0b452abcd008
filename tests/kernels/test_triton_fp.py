"""fp_gemm and words of 2 to 7 bits in Triton: on a GPU, else in Triton's interpreter."""

import importlib

import pytest
import torch

from smoothq.kernels import reference
from tests.kernels.test_fp_gemm import FORMS, WORD_BITS, each_form, fp_weight, word_weight
from tests.kernels.test_gemm import Draw, assert_rounded_once
from tests.kernels.test_triton import (  # noqa: F401
    DEVICE,
    bfloat16_is_rounded_to_nearest,
    each_dtype,
    fresh_tensors_hold_garbage,
    only_the_first_tile_runs,
    run,
    take_only,
)

floating = importlib.import_module("smoothq.kernels.triton.fp_gemm")


def assert_fp_alike(tokens: int, width: int, form: str, dtype: torch.dtype, rows: int = 33) -> None:
    draw = Draw(tokens + width)
    packed, scale, tensor_scale, element = fp_weight(draw, rows, width, form)
    operands = (packed, scale, tensor_scale, draw.floats(rows) if tokens % 2 else None, element)
    x = draw.floats(tokens, width).to(dtype)
    exact = reference.fp_gemm(x.double(), *operands)
    assert_rounded_once(run("fp_gemm", x, *operands), exact, dtype)


class TestFpGemm:
    @each_form
    @each_dtype
    @pytest.mark.parametrize("tokens", [1, 17])
    @pytest.mark.parametrize("width", [64, 96, 160])
    def test_reference(self, form: str, dtype: torch.dtype, tokens: int, width: int) -> None:
        size = FORMS[form][2]
        if size is None or width % size == 0:
            assert_fp_alike(tokens, width, form, dtype)

    @pytest.mark.parametrize("form", ["E4M3, rows", "E2M1, rows"])
    @pytest.mark.parametrize("width", [1, 31, 63, 65, 97, 129])
    def test_wherever_the_last_block_ends(self, form: str, width: int) -> None:
        assert_fp_alike(3, width, form, torch.float32)

    @pytest.mark.parametrize("form", ["E4M3, rows", "E2M1, rows", "NVFP4"])
    @pytest.mark.parametrize(("tokens", "width"), [(3, 64), (17, 160)])
    def test_where_no_sum_is_carried(
        self, form: str, tokens: int, width: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As on Hopper."""
        monkeypatch.setattr(floating, "carries_float_sums", lambda device: False)
        assert_fp_alike(tokens, width, form, torch.float32)

    @each_form
    @pytest.mark.parametrize("tile", floating.PREFILL_TILES | floating.DECODE_TILES)
    def test_every_tile(self, form: str, tile: str, monkeypatch: pytest.MonkeyPatch) -> None:
        tiles = floating.PREFILL_TILES | floating.DECODE_TILES
        named = {"OPERAND": None}
        settings = {"CODES": FORMS[form][0], "GROUP": FORMS[form][2] or 0}
        if tiles[tile] not in floating.tiles_that_fit([tiles[tile]], named, **settings):
            return
        for launcher in ("_prefill_kernel", "_decode_kernel"):
            take_only(monkeypatch, floating, launcher, "_fp_kernel", tiles[tile])
        assert_fp_alike(5, 192, form, torch.float32, rows=40)

    def test_every_byte_and_every_nibble(self) -> None:
        codes = torch.arange(256).to(torch.uint8).reshape(4, 64)
        for packed, element in ((codes, "e4m3"), (codes[:, :32].contiguous(), "e2m1")):
            operands = (torch.eye(64), packed, torch.ones(4, 1), None, None, element)
            values = reference.fp_values(packed, element, 64)
            assert torch.equal(run("fp_gemm", *operands).t(), values)

    def test_every_power_of_two(self) -> None:
        scale = torch.arange(256).to(torch.uint8).reshape(128, 2)
        packed, x = torch.full((128, 64), 0x38, dtype=torch.uint8), torch.zeros(2, 64)
        x[0, 0] = x[1, 32] = 1
        found = run("fp_gemm", x, packed, scale, None, None, "e4m3").t()
        expected = reference.fp_scales(scale, None)
        nan = expected.isnan() | expected.flip(1).isnan()  # it meets the other group's zero
        assert torch.equal(found[~nan], expected[~nan])
        assert found[nan].isnan().all()

    @pytest.mark.parametrize(
        ("size", "kind"), [(8, "e4m3"), (16, "e8m0"), (16, "float"), (48, "e4m3")]
    )
    def test_groups_that_do_not_fit_the_blocks_are_refused_by_name(
        self, size: int, kind: str
    ) -> None:
        packed, scale = torch.zeros(5, 48, dtype=torch.uint8), torch.ones(5, 96 // size)
        scale = scale if kind == "float" else scale.to(torch.uint8)
        tensor_scale = torch.ones(1) if kind == "e4m3" else None
        with pytest.raises(NotImplementedError, match=f"fp_gemm: E2M1 groups of {size} columns"):
            run("fp_gemm", torch.ones(1, 96), packed, scale, tensor_scale, None, "e2m1")


class TestWords:
    @pytest.mark.parametrize("bits", WORD_BITS)
    @each_dtype
    @pytest.mark.parametrize(
        ("width", "groups", "tokens"), [(64, 2, 1), (97, 1, 17), (40, 5, 3), (192, 1, 3)]
    )
    @pytest.mark.parametrize("multiplied", [False, True], ids=["float scales", "multipliers"])
    def test_reference(
        self, bits: int, dtype: torch.dtype, width: int, groups: int, tokens: int, multiplied: bool
    ) -> None:
        draw = Draw(width + bits)
        words, scale = word_weight(draw, 33, width, bits, 1 if multiplied else groups)
        multiplier = draw.multipliers(33, groups) if multiplied else None
        operands = (words, scale, multiplier, draw.floats(33), bits)
        x = draw.floats(tokens, width).to(dtype)
        exact = reference.weight_only_gemm(x.double(), *operands)
        assert_rounded_once(run("weight_only_gemm", x, *operands), exact, dtype)
