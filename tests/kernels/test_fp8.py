"""Products of E4M3 codes on both sides, and the quantizer that makes them, on both backends."""

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from smoothq import kernels
from smoothq.kernels import reference
from smoothq.kernels.formats import e4m3_values
from smoothq.modules import InputQuantizer, InputSpec, QuantizedLinear, WeightSpec
from smoothq.rounding.float_grid import FloatGrid
from smoothq.rounding.rtn import round_to_nearest
from tests.kernels.extremes import EXTREMES
from tests.kernels.test_gemm import Draw, assert_rounded_once
from tests.kernels.test_triton import (  # noqa: F401
    bfloat16_is_rounded_to_nearest,
    each_backend,
    each_dtype,
    fresh_tensors_hold_garbage,
    on,
    only_the_first_tile_runs,
    run,
    take_only,
)

launch = importlib.import_module("smoothq.kernels.triton.launch")
products = importlib.import_module("smoothq.kernels.triton.fp8_gemm")
TILES = products.PREFILL_TILES | products.DECODE_TILES
SCALINGS = {"token": 0, "tensor": 0, "static": 0, "group": 8}
each_scaling = pytest.mark.parametrize("scaling", SCALINGS)


@pytest.fixture(autouse=True)
def not_a_number_stays_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: Triton's interpreter takes E4M3's NaN for 480."""
    if not launch.INTERPRETED:
        return
    interpreter = importlib.import_module("triton.runtime.interpreter")
    convert = interpreter._convert_float

    def converted(values: Any, source: Any, target: Any, mode: Any) -> Any:
        if str(source) == "fp8e4nv":
            floats = e4m3_values(torch.tensor(values).view(torch.uint8))
            return floats.half().view(torch.uint16).numpy()
        return convert(values, source, target, mode)

    monkeypatch.setattr(interpreter, "_convert_float", converted)


def operands_of(
    tokens: int, rows: int, width: int, groups: int = 1, one_scale: bool = False
) -> tuple[Any, ...]:
    draw = Draw(tokens + rows + width)
    codes, weight = (draw.codes(n, width, lowest=-126, highest=126) for n in (tokens, rows))
    coded = [(c.abs() | (c & -128)).view(torch.uint8) for c in (codes, weight)]
    scale = draw.scales(1, 1) if one_scale else draw.scales(tokens, groups)
    return coded[0], scale, coded[1], draw.scales(rows, groups)


class TestFp8Gemm:
    @each_backend
    @each_dtype
    @pytest.mark.parametrize(
        ("tokens", "rows", "width", "groups"),
        [
            *[(1, 5, 1, 1), (3, 33, 33, 1), (17, 70, 129, 1), (33, 5, 301, 1)],
            *[(3, 33, 256, 2), (17, 5, 768, 6), (17, 5, 512, 2)],
        ],
    )
    def test_reference(
        self, tokens: int, rows: int, width: int, groups: int, dtype: torch.dtype, backend: str
    ) -> None:
        operands = operands_of(tokens, rows, width, groups)
        bias = Draw().floats(rows) if tokens % 2 else None
        exact = reference.fp8_gemm(*operands, bias, torch.float64)
        assert_rounded_once(on(backend, "fp8_gemm", *operands, bias, dtype), exact, dtype)

    @each_backend
    def test_one_scale_of_all_tokens(self, backend: str) -> None:
        operands = (*operands_of(5, 7, 65, one_scale=True), None)
        exact = reference.fp8_gemm(*operands, torch.float64)
        found = on(backend, "fp8_gemm", *operands, torch.float32)
        assert_rounded_once(found, exact, torch.float32)

    @pytest.mark.parametrize("tile", TILES)
    @pytest.mark.parametrize("groups", [1, 2])
    def test_every_tile(self, tile: str, groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
        for launcher in ("_prefill_kernel", "_decode_kernel"):
            take_only(monkeypatch, products, launcher, "_fp8_kernel", TILES[tile])
        operands = (*operands_of(5, 40, 256, groups), None)
        exact = reference.fp8_gemm(*operands, torch.float64)
        found = run("fp8_gemm", *operands, torch.float32)
        assert_rounded_once(found, exact, torch.float32)

    @each_backend
    def test_every_byte_on_both_sides(self, backend: str) -> None:
        bytes_ = torch.arange(256).to(torch.uint8)[:, None]
        weight, one = bytes_.masked_fill(bytes_ & 0x7F == 0x7F, 0), torch.ones(256, 1)
        found = on(backend, "fp8_gemm", bytes_, one, weight, one, None, torch.float32)
        expected = e4m3_values(bytes_) @ e4m3_values(weight).t()
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)

    def test_groups_across_the_tiles_steps_are_refused_by_name(self) -> None:
        with pytest.raises(NotImplementedError, match="fp8_gemm: groups of 64 columns"):
            run("fp8_gemm", *operands_of(1, 1, 128, 2), None, torch.float32)


class TestFp8Quantize:
    @each_backend
    @each_scaling
    @each_dtype
    @pytest.mark.parametrize("extreme", EXTREMES)
    def test_reference_and_what_the_codes_stand_for(
        self, extreme: str, dtype: torch.dtype, scaling: str, backend: str
    ) -> None:
        x = EXTREMES[extreme].to(dtype)
        step = torch.tensor([0.01]) if scaling == "static" else None
        form = (scaling, SCALINGS[scaling], step)
        codes, scale, *_ = on(backend, "fp8_quantize", x, *form)
        expected = reference.fp8_quantize(x, *form)
        assert torch.equal(codes, expected.codes)
        torch.testing.assert_close(scale, expected.scale, rtol=0, atol=0, equal_nan=True)
        values = reference.fp_quantize(x, "e4m3", *form)
        rows = scale if scale.dim() == 2 else scale.reshape(1, 1)
        found = reference.by_group(e4m3_values(codes), rows.expand(3, -1))
        torch.testing.assert_close(found, values, rtol=0, atol=0, equal_nan=True)


def linear_of(mode: str, granularity: str, width: int = 256) -> QuantizedLinear:
    group = 128 if granularity == "block" else width
    grid = FloatGrid(8, granularity, group)
    site = InputQuantizer("x", InputSpec(width, 8, mode, group_size=128), readers=2)
    linear = QuantizedLinear(WeightSpec(40, width, grid), site, torch.float32)
    linear.set_weight(round_to_nearest(Draw().floats(40, width), grid), None)
    return linear


class TestLayers:
    """Where a device multiplies the codes, a layer asks for them; else it takes their values."""

    @pytest.mark.parametrize(
        ("mode", "granularity"),
        [
            *[("fp_token", "channel"), ("fp_token", "tensor"), ("fp_static", "channel")],
            *[("fp_tensor", "tensor"), ("fp_group", "block")],
        ],
    )
    def test_codes_give_what_their_values_give(
        self, mode: str, granularity: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        emulating = linear_of(mode, granularity)
        assert emulating.operators() == ("fp_quantize", "fp_gemm (emulated)")
        monkeypatch.setattr(kernels.cpu, "multiplies_fp8", lambda device, architecture: True)
        native = linear_of(mode, granularity)
        assert native.operators() == ("fp8_quantize", "fp8_gemm")
        x: Tensor = Draw(3).floats(2, 5, 256)
        for _ in range(2):  # the second reader's input is the first one's
            torch.testing.assert_close(native(x), emulating(x), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize(
        ("mode", "granularity", "width"), [("fp_group", "channel", 256), ("float", "channel", 256)]
    )
    def test_scales_that_do_not_fit_are_emulated(
        self, mode: str, granularity: str, width: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(kernels.cpu, "multiplies_fp8", lambda device, architecture: True)
        assert "fp8_gemm" not in linear_of(mode, granularity, width).operators()

    def test_readers_that_differ_each_get_what_they_ask_for(self) -> None:
        site = linear_of("fp_token", "channel").site_input
        x = Draw().floats(3, 256)
        codes, values = site(x, True), site(x)
        assert torch.equal(e4m3_values(codes.codes) * codes.scale, values)


def test_which_gpus_multiply_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    targets = {("cuda", 80): False, ("cuda", 86): False, ("cuda", 89): True, ("cuda", 90): True}
    targets |= {("cuda", 100): True, ("hip", "gfx942"): False, ("hip", "gfx950"): True}
    for target, expected in targets.items():
        monkeypatch.setattr(launch, "_target", lambda device, target=target: target)
        assert launch.multiplies_fp8(torch.device("cuda")) == expected
        scaled = target in (("cuda", 100), ("hip", "gfx950"))
        assert launch.multiplies_mx(torch.device("cuda")) == scaled
    assert not launch.multiplies_fp8(torch.device("cpu"))
