"""Products of MXFP8 and MXFP4 codes on both sides, and their quantizer, on both backends."""

import importlib
from typing import Any

import numpy as np
import pytest
import torch

from smoothq import kernels
from smoothq.kernels import reference
from smoothq.kernels.formats import E2M1, e4m3_values, powers_of_two
from smoothq.modules import InputQuantizer, InputSpec, QuantizedLinear, WeightSpec
from smoothq.rounding.float_grid import FloatGrid
from smoothq.rounding.rtn import round_to_nearest
from tests.kernels.extremes import EXTREMES
from tests.kernels.test_fp_gemm import fp_weight
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
products = importlib.import_module("smoothq.kernels.triton.mx_gemm")
TILES = products.PREFILL_TILES | products.DECODE_TILES
BITS = {"e4m3": 8, "e2m1": 4}
FORM = {"e4m3": "MXFP8", "e2m1": "MXFP4"}
each_element = pytest.mark.parametrize("element", BITS)


@pytest.fixture(autouse=True)
def blocks_are_scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter has no `dot_scaled`: two consecutive E2M1 codes a byte, as OCP's."""
    if not launch.INTERPRETED:
        return
    interpreter = importlib.import_module("triton.runtime.interpreter")

    def values(codes: Any, scale: Any) -> Any:
        """Float64 (rows, K) of uint8 (rows, bytes)."""
        bytes_ = torch.from_numpy(np.ascontiguousarray(codes)).view(torch.uint8)
        steps = powers_of_two(torch.from_numpy(np.ascontiguousarray(scale)).view(torch.uint8))
        floats = e4m3_values(bytes_)
        if bytes_.shape[1] * 2 == steps.shape[1] * 32:
            pairs = torch.stack([bytes_ & 15, bytes_ >> 4], -1).flatten(1)
            floats = E2M1.values(E2M1.ranks_of(pairs).float())
        return (floats.unflatten(1, (-1, 32)) * steps[..., None]).flatten(1).double().numpy()

    def dot_scaled(
        semantic: Any,
        left: Any,
        left_scale: Any,
        _left: str,
        right: Any,
        right_scale: Any,
        *rest: Any,
    ) -> Any:
        total = rest[1]
        x = values(left.handle.data, left_scale.handle.data)
        y = values(right.handle.data.T, right_scale.handle.data)
        result = (x @ y.T + total.handle.data).astype(np.float32)
        handle = interpreter.TensorHandle(result, total.handle.dtype.scalar)
        return semantic.tensor(handle, total.type)

    kind = importlib.import_module("triton.language.semantic").TritonSemantic
    monkeypatch.setattr(kind, "dot_scaled", dot_scaled)


class TestMxGemm:
    @each_backend
    @each_element
    @each_dtype
    @pytest.mark.parametrize(
        ("tokens", "rows", "width"), [(1, 5, 64), (17, 130, 192), (3, 33, 256)]
    )
    def test_reference(
        self, tokens: int, rows: int, width: int, dtype: torch.dtype, element: str, backend: str
    ) -> None:
        draw = Draw(tokens)
        packed, scale, *_ = fp_weight(draw, rows, width, FORM[element])
        packed = packed & 0x77  # no NaN among E4M3's
        codes, steps, *_ = reference.mx_quantize(draw.floats(tokens, width), element)
        operands = (codes, steps, packed, scale, draw.floats(rows) if tokens % 2 else None, element)
        exact = reference.mx_gemm(*operands, torch.float64)
        assert_rounded_once(on(backend, "mx_gemm", *operands, dtype), exact, dtype)

    @each_backend
    def test_no_token(self, backend: str) -> None:
        packed, scale, *_ = fp_weight(Draw(), 5, 64, "MXFP4")
        codes, steps, *_ = reference.mx_quantize(torch.empty(0, 64), "e2m1")
        operands = (codes, steps, packed, scale, None, "e2m1", torch.half)
        found = on(backend, "mx_gemm", *operands)
        assert (found.shape, found.dtype) == ((0, 5), torch.half)

    @each_element
    @pytest.mark.parametrize("tile", TILES)
    def test_every_tile(self, tile: str, element: str, monkeypatch: pytest.MonkeyPatch) -> None:
        for launcher in ("_prefill_kernel", "_decode_kernel"):
            take_only(monkeypatch, products, launcher, "_mx_kernel", TILES[tile])
        draw = Draw()
        packed, scale, *_ = fp_weight(draw, 40, 192, FORM[element])
        codes, steps, *_ = reference.mx_quantize(draw.floats(5, 192), element)
        operands = (codes, steps, packed & 0x77, scale, None, element)
        exact = reference.mx_gemm(*operands, torch.float64)
        found = run("mx_gemm", *operands, torch.float32)
        assert_rounded_once(found, exact, torch.float32)


@each_backend
@each_element
@each_dtype
@pytest.mark.parametrize("extreme", EXTREMES)
def test_quantizer_and_what_the_codes_stand_for(
    extreme: str, dtype: torch.dtype, element: str, backend: str
) -> None:
    x = torch.nn.functional.pad(EXTREMES[extreme], (0, 40)).to(dtype)
    codes, scale, *_ = on(backend, "mx_quantize", x, element)
    expected = reference.mx_quantize(x, element)
    assert torch.equal(scale, expected.scale)
    known = (expected.scale != 255).repeat_interleave(codes.shape[1] // scale.shape[1], 1)
    assert torch.equal(codes[known], expected.codes[known])
    values = reference.fp_quantize(x, element, "e8m0", 32)
    found = reference.mx_values(codes, scale, element)
    torch.testing.assert_close(found, values, rtol=0, atol=0, equal_nan=True)


@each_element
@pytest.mark.parametrize("width", [96, 128])
def test_a_layer_asks_for_codes_where_a_device_multiplies_them(
    element: str, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = FloatGrid(BITS[element], "group", 32, element, "e8m0")
    quantized = round_to_nearest(Draw().floats(40, width), grid)

    def linear() -> QuantizedLinear:
        spec = InputSpec(width, BITS[element], "fp_e8m0", group_size=32)
        layer = QuantizedLinear(
            WeightSpec(40, width, grid), InputQuantizer("x", spec), torch.float32
        )
        layer.set_weight(quantized, None)
        return layer

    emulating = linear()
    assert emulating.operators() == ("fp_quantize", "fp_gemm (emulated)")
    monkeypatch.setattr(kernels.cpu, "multiplies_mx", lambda device, architecture: True)
    native = linear()
    assert native.operators() == (
        ("mx_quantize", "mx_gemm") if width == 128 else emulating.operators()
    )
    x = Draw(3).floats(2, 5, width)
    torch.testing.assert_close(native(x), emulating(x), rtol=1e-5, atol=1e-5)
