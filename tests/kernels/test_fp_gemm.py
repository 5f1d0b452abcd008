"""Products and quantizers of floating-point codes, and of words, against their definitions."""

import importlib

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from smoothq import kernels
from smoothq.kernels import reference
from smoothq.kernels.cpu import native
from tests.kernels.extremes import EXTREMES
from tests.kernels.test_cpu import isa  # noqa: F401
from tests.kernels.test_gemm import Draw, assert_rounded_once

MANY = settings(max_examples=40, deadline=None, derandomize=True)
WORD_BITS = (2, 3, 5, 6, 7)
# element, what the scales are, columns that share one (None: a row), whether a tensor has one
FORMS = {
    "E4M3, rows": ("e4m3", "float", None),
    "E4M3, groups": ("e4m3", "float", 32),
    "MXFP8": ("e4m3", "e8m0", 32),
    "MXFP4": ("e2m1", "e8m0", 32),
    "NVFP4": ("e2m1", "e4m3", 16),
    "E2M1, groups": ("e2m1", "float", 64),
    "E2M1, rows": ("e2m1", "float", None),
}
each_form = pytest.mark.parametrize("form", FORMS)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
# Few tokens meet the codes, many a float copy or tiles, of which the last may be part of one.
TOKENS = (1, 2, 5, 13, 33, 70)


def fp_weight(
    draw: Draw, rows: int, width: int, form: str, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor | None, str]:
    """Packed codes, scales, the tensor's scale and the element."""
    element, kind, group = FORMS[form]
    columns = width if element == "e4m3" else (width + 1) // 2
    packed = draw.codes(rows, columns).view(torch.uint8)
    groups = 1 if group is None else width // group
    tensor_scale = None
    if kind == "float":
        scale = draw.scales(rows, groups).to(dtype)
    elif kind == "e8m0":
        scale = draw.codes(rows, groups, lowest=110).view(torch.uint8)
    else:
        scale, tensor_scale = draw.codes(rows, groups, lowest=1, highest=126), draw.scales(1)
    return packed, scale if kind == "float" else scale.view(torch.uint8), tensor_scale, element


def word_weight(draw: Draw, rows: int, width: int, bits: int, groups: int) -> tuple[Tensor, Tensor]:
    """Words of codes, and scales of 16 bits as checkpoints have them."""
    half = 2 ** (bits - 1)
    codes = draw.codes(rows, width, lowest=-half, highest=half - 1)
    return pack_to_int32(codes, bits), draw.scales(rows, groups).bfloat16()


def assert_fp_product(x: Tensor, *weight: object) -> None:
    packed, scale, tensor_scale, bias, element = weight
    operands = (packed, scale, tensor_scale, bias, element)
    exact = reference.fp_gemm(x.double(), *operands)
    found = kernels.fp_gemm(x, *operands)
    assert_rounded_once(found, exact, x.dtype)
    assert torch.equal(found, kernels.fp_gemm.registered(x, *operands))


def equal_bits(found: Tensor, expected: Tensor) -> bool:
    """Whether all bits are the same; NaNs may differ in theirs."""
    nan = expected.isnan()
    bits = [x.masked_fill(nan, 0.0).view(torch.int32) for x in (found, expected)]
    return torch.equal(found.isnan(), nan) and torch.equal(*bits)


@pytest.mark.usefixtures("isa")
class TestFpGemm:
    @each_form
    @each_dtype
    @pytest.mark.parametrize("width", [64, 320])
    def test_reference(self, form: str, dtype: torch.dtype, width: int) -> None:
        for tokens in TOKENS:
            draw = Draw(tokens + width)
            packed, scale, tensor_scale, element = fp_weight(draw, 37, width, form)
            bias = draw.floats(37) if tokens % 2 else None
            x = draw.floats(tokens, width).to(dtype)
            assert_fp_product(x, packed, scale, tensor_scale, bias, element)

    @pytest.mark.parametrize("form", ["E4M3, groups", "E2M1, groups", "E4M3, rows"])
    @each_dtype
    def test_scales_of_any_float(self, form: str, dtype: torch.dtype) -> None:
        for tokens in TOKENS:
            draw = Draw(tokens)
            packed, scale, _, element = fp_weight(draw, 33, 128, form, dtype)
            assert_fp_product(draw.floats(tokens, 128), packed, scale, None, None, element)

    @pytest.mark.parametrize(
        ("form", "width"),
        [
            *[("E4M3, rows", width) for width in (1, 63, 97)],
            *[("E2M1, rows", width) for width in (1, 63, 97, 130)],
            *[("MXFP4", 96), ("MXFP8", 96), ("NVFP4", 48), ("NVFP4", 16)],
        ],
    )
    def test_widths_that_are_no_whole_blocks(self, form: str, width: int) -> None:
        for tokens in (1, 40):
            draw = Draw(tokens)
            packed, scale, tensor_scale, element = fp_weight(draw, 9, width, form)
            operands = (packed, scale, tensor_scale, None, element)
            assert_fp_product(draw.floats(tokens, width), *operands)

    @pytest.mark.parametrize("tokens", [1, 64])
    def test_every_byte_and_every_nibble(self, tokens: int) -> None:
        codes = torch.arange(256).to(torch.uint8)
        bytes_, one = codes.reshape(4, 64), torch.ones(4, 1)
        pairs = codes.reshape(4, 64)[:, :32].contiguous()
        one_hot = torch.eye(64)
        for packed, element in ((bytes_, "e4m3"), (pairs, "e2m1")):
            values = reference.fp_values(packed, element, 64)
            step = max(tokens, 1)
            found = [
                kernels.fp_gemm(rows, packed, one, None, None, element)
                for rows in one_hot.split(step)
            ]
            assert torch.equal(torch.cat(found).t(), values)

    @pytest.mark.parametrize("tokens", [1, 64])
    def test_every_power_of_two_that_a_float_can_multiply(self, tokens: int) -> None:
        """Products of tiles have no subnormal numbers."""
        scale = torch.arange(3, 252).to(torch.uint8).repeat_interleave(2, 0).reshape(249, 2)
        packed = torch.full((249, 32), 0x7A, dtype=torch.uint8)  # 1 in the first half, 6 then
        x = torch.zeros(tokens, 64)
        x[:, 0] = 1
        found = kernels.fp_gemm(x, packed, scale, None, None, "e2m1")
        expected = reference.fp_gemm(x.double(), packed, scale, None, None, "e2m1").float()
        assert torch.equal(found, expected)

    @pytest.mark.parametrize("tokens", [1, 40])
    def test_a_nan_scale_is_not_lost(self, tokens: int) -> None:
        draw = Draw()
        packed, scale, _, element = fp_weight(draw, 3, 64, "MXFP4")
        scale[1, 1] = 255
        found = kernels.fp_gemm(draw.floats(tokens, 64), packed, scale, None, None, element)
        assert found.isnan().any(0).tolist() == [False, True, False]

    @pytest.mark.parametrize("tokens", [1, 40])
    def test_an_infinite_token_stays_alone(self, tokens: int) -> None:
        draw = Draw()
        weight = fp_weight(draw, 3, 64, "E4M3, rows")
        packed, scale, tensor_scale, element = weight
        x = draw.floats(tokens, 64)
        before = kernels.fp_gemm(x, packed, scale, tensor_scale, None, element)
        x[0, 5] = torch.inf
        found = kernels.fp_gemm(x, packed, scale, tensor_scale, None, element)
        exact = reference.fp_gemm(x.double(), packed, scale, tensor_scale, None, element)
        assert torch.equal(found[0].double(), exact[0])
        assert torch.equal(found[1:], before[1:])


@pytest.mark.usefixtures("isa")
class TestWords:
    @pytest.mark.parametrize("bits", WORD_BITS)
    @each_dtype
    @pytest.mark.parametrize(
        ("width", "groups"), [(192, 1), (192, 3), (192, 6), (192, 12), (97, 1), (40, 5)]
    )
    def test_reference(self, bits: int, dtype: torch.dtype, width: int, groups: int) -> None:
        for tokens in TOKENS:
            draw = Draw(tokens + bits)
            words, scale = word_weight(draw, 35, width, bits, groups)
            operands = (words, scale, None, draw.floats(35), bits)
            x = draw.floats(tokens, width).to(dtype)
            exact = reference.weight_only_gemm(x.double(), *operands)
            found = kernels.weight_only_gemm(x, *operands)
            assert_rounded_once(found, exact, dtype)
            assert torch.equal(found, kernels.weight_only_gemm.registered(x, *operands))

    @pytest.mark.parametrize("bits", WORD_BITS)
    @pytest.mark.parametrize("tokens", [1, 64])
    def test_every_code_in_every_place(self, bits: int, tokens: int) -> None:
        half = 2 ** (bits - 1)
        columns = torch.arange(64)
        codes = torch.stack([(columns + row) % (2 * half) - half for row in range(2 * half)])
        words, one = pack_to_int32(codes.to(torch.int8), bits), torch.ones(2 * half, 1)
        found = [
            kernels.weight_only_gemm(rows, words, one, None, None, bits)
            for rows in torch.eye(64).split(tokens)
        ]
        assert torch.equal(torch.cat(found).t(), codes.float())


@pytest.mark.usefixtures("isa")
class TestOperands:
    """C++ believes the sizes that it is told: what does not fit them is refused by name."""

    @pytest.mark.parametrize("tokens", [1, 40])
    def test_a_product_names_what_does_not_fit(self, tokens: int) -> None:
        draw = Draw()
        x, (packed, scale, tensor_scale, _) = (
            draw.floats(tokens, 64),
            fp_weight(draw, 5, 64, "NVFP4"),
        )
        fit = {"packed": packed, "scale": scale, "tensor_scale": tensor_scale, "bias": None}
        for name, wrong in (
            ("packed", packed[:, 1:].contiguous()),
            ("packed", packed.view(torch.int8)),
            ("scale", scale[:4].contiguous()),
            ("scale", scale[:, :3].contiguous()),
            ("tensor_scale", torch.ones(2)),
            ("bias", torch.ones(4)),
        ):
            operands = (fit | {name: wrong}).values()
            with pytest.raises(ValueError, match=f"operand '{name}'"):
                kernels.fp_gemm(x, *operands, "e2m1")

    @pytest.mark.parametrize("tokens", [1, 40])
    def test_an_unknown_element_is_refused(self, tokens: int) -> None:
        packed, scale = torch.zeros(5, 64, dtype=torch.uint8), torch.ones(5, 1)
        with pytest.raises((ValueError, RuntimeError), match="element 'e5m2' is neither"):
            kernels.fp_gemm(torch.ones(tokens, 64), packed, scale, None, None, "e5m2")

    def test_words_of_another_length_are_refused(self) -> None:
        words, scale = word_weight(Draw(), 5, 64, 3, 2)
        with pytest.raises(ValueError, match=r"operand 'packed' is int32 \(5, 6\)"):
            kernels.weight_only_gemm(torch.ones(1, 64), words, scale, None, None, 5)

    def test_a_quantizer_names_what_is_missing(self) -> None:
        with pytest.raises(ValueError, match="'tensor_scale' is missing"):
            native.fp_quantized(torch.ones(1, 16), "e2m1", "e4m3", 16, None)
        with pytest.raises(ValueError, match="group_size 0"):
            native.fp_quantized(torch.ones(1, 16), "e2m1", "e8m0", 0, None)


SCALINGS = {
    "token": {},
    "tensor": {},
    "static": {"tensor_scale": torch.tensor([0.013])},
    "group": {"group_size": 8},
    "e8m0": {"group_size": 32},
    "e4m3": {"group_size": 16, "tensor_scale": torch.tensor([0.0021])},
}
each_scaling = pytest.mark.parametrize("scaling", SCALINGS)
each_element = pytest.mark.parametrize("element", ["e4m3", "e2m1"])
float32s = st.floats(width=32)
# Values of one size, as a token's are, and any that there are.
rows = st.lists(st.floats(-100, 100, width=32) | float32s, min_size=1, max_size=70)


@pytest.fixture(params=["cpu", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "triton":
        pytest.importorskip("triton")
    return request.param


def rounded_by(backend: str, x: Tensor, element: str, scaling: str, **how: object) -> Tensor:
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    placed = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in how.items()}
    module = importlib.import_module(f"smoothq.kernels.{backend}")
    return module.fp_quantize(x.to(device), element, scaling, **placed).cpu()


@pytest.mark.usefixtures("isa")
class TestFpQuantizeOnEveryInstructionSet:
    @each_scaling
    @each_element
    @MANY
    @given(row=rows)
    def test_any_row(self, scaling: str, element: str, row: list[float]) -> None:
        x = torch.tensor([row])
        found = kernels.fp_quantize(x, element, scaling, **SCALINGS[scaling])
        expected = reference.fp_quantize(x, element, scaling, **SCALINGS[scaling])
        assert equal_bits(found, expected)


class TestFpQuantize:
    @each_scaling
    @each_element
    @pytest.mark.parametrize("values", EXTREMES)
    def test_extremes(self, scaling: str, element: str, values: str, backend: str) -> None:
        x, how = EXTREMES[values], SCALINGS[scaling]
        found = rounded_by(backend, x, element, scaling, **how)
        assert equal_bits(found, reference.fp_quantize(x, element, scaling, **how))

    @each_scaling
    @each_element
    @each_dtype
    @pytest.mark.parametrize("width", [1, 15, 32, 97, 576])
    def test_any_width_and_dtype(
        self, scaling: str, element: str, dtype: torch.dtype, width: int, backend: str
    ) -> None:
        x, how = (Draw(width).floats(2, 3, width) * 3).to(dtype), SCALINGS[scaling]
        found = rounded_by(backend, x, element, scaling, **how)
        assert found.dtype == torch.float32
        assert equal_bits(found, reference.fp_quantize(x, element, scaling, **how))

    @each_element
    def test_ties_go_to_the_even_code(self, element: str, backend: str) -> None:
        form = reference.FORMATS[element]
        values = form.values(torch.arange(form.highest + 1.0))
        middles = torch.cat([(values[1:] + values[:-1]) / 2, -(values[1:] + values[:-1]) / 2])[None]
        how = {"tensor_scale": torch.ones(1)}
        found = rounded_by(backend, middles, element, "static", **how)
        assert equal_bits(found, reference.fp_quantize(middles, element, "static", **how))

    @pytest.mark.parametrize("tensor_scale", [0.0, -0.01, torch.inf, torch.nan, 1e-30])
    def test_scales_of_the_tensor_that_leave_little(
        self, tensor_scale: float, backend: str
    ) -> None:
        x, how = Draw().floats(2, 40), {"tensor_scale": torch.tensor([tensor_scale])}
        for scaling, group in (("static", 0), ("e4m3", 16)):
            found = rounded_by(backend, x, "e2m1", scaling, group_size=group, **how)
            expected = reference.fp_quantize(x, "e2m1", scaling, group, **how)
            assert equal_bits(found, expected)

    @each_scaling
    def test_no_token(self, scaling: str, backend: str) -> None:
        found = rounded_by(backend, torch.ones(2, 0, 32), "e4m3", scaling, **SCALINGS[scaling])
        assert found.shape == (2, 0, 32)

    @each_scaling
    def test_a_compilers_graph_gives_the_same(self, scaling: str) -> None:
        x, how = Draw().floats(3, 96), SCALINGS[scaling]

        @torch.compile(fullgraph=True, backend="aot_eager")
        def compiled(x: Tensor) -> Tensor:
            return kernels.fp_quantize(x, "e4m3", scaling, **how)

        assert equal_bits(compiled(x), kernels.fp_quantize(x, "e4m3", scaling, **how))

    def test_a_gradient_is_refused_not_lost(self) -> None:
        x = torch.ones(1, 32, requires_grad=True)
        with pytest.raises(RuntimeError, match="no gradient"):
            kernels.fp_quantize(x, "e4m3", "token").sum().backward()
