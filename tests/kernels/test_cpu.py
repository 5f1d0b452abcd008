"""The compiled CPU operators: every way to a result is the same result, to the last integer."""

import platform
import warnings

import pytest
import torch
from torch import Tensor

from smoothq import kernels
from smoothq.kernels.cpu import native
from smoothq.kernels.reference import multiplied_weight, unpack_int4
from smoothq.transforms.hadamard import Hadamard
from tests.kernels.test_gemm import Draw, assert_rounded_once

reference = kernels.reference
WIDTHS = (1, 63, 64, 65, 320, 1000)
PORTABLE = {"x86_64": "-march=x86-64-v2", "aarch64": "-march=armv8-a"}


@pytest.fixture
def portable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same source without the processor's own instructions: what others run."""
    target = PORTABLE.get(platform.machine())
    if target is None:
        pytest.skip(f"no portable target is known for {platform.machine()}")
    flags = tuple(target if flag == "-march=native" else flag for flag in native.FLAGS)
    monkeypatch.setattr(native, "FLAGS", flags)
    native.library.cache_clear()
    yield
    native.library.cache_clear()


@pytest.fixture
def not_compiled(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    """A machine without a compiler, and with an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    native.library.cache_clear()
    yield
    native.library.cache_clear()


def check_int8(tokens: int, rows: int, width: int, bias: bool, dtype: torch.dtype) -> None:
    draw = Draw(tokens * rows + width)
    codes, weight = draw.codes(tokens, width), draw.codes(rows, width)
    scale, row_scale = draw.scales(tokens, 1), draw.scales(rows)
    operands = (codes, scale, weight, row_scale, draw.floats(rows) if bias else None)
    exact = reference.int8_gemm(*operands, torch.float64)
    few, many = native.int8_gemm(*operands, dtype), kernels.cpu._many_tokens(*operands, dtype)
    assert_rounded_once(few, exact, dtype)
    # The two are timed against one another: what a run gives must not depend on which won.
    assert torch.equal(few, many)


def check_int4(tokens: int, rows: int, width: int, groups: int | None) -> None:
    draw = Draw(tokens * rows + width)
    codes, scale, row_scale = draw.codes(tokens, width), draw.scales(tokens, 1), draw.scales(rows)
    packed = torch.randint(0, 256, (rows, (width + 1) // 2), dtype=torch.uint8)
    multiplier = None if groups is None else draw.multipliers(rows, groups)
    operands = (codes, scale, packed, row_scale, multiplier, None)
    exact = reference.int4_gemm(*operands, torch.float64)
    assert_rounded_once(kernels.cpu.int4_gemm(*operands, torch.float32), exact, torch.float32)
    unpacked = multiplied_weight(unpack_int4(packed, width), multiplier)
    assert torch.equal(native.unpacked(packed, width, multiplier), unpacked)


class TestProducts:
    def test_they_are_compiled_here(self) -> None:
        assert kernels.cpu.is_compiled()

    @pytest.mark.parametrize("width", WIDTHS)
    @pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 9, 33, 130])
    def test_int8(self, tokens: int, width: int) -> None:
        for rows, bias, dtype in (
            (1, False, torch.float32),
            (19, True, torch.bfloat16),
            (64, True, torch.float16),
        ):
            check_int8(tokens, rows, width, bias, dtype)

    def test_the_largest_sums_are_exact(self) -> None:
        codes = torch.full((3, 65_000), -128, dtype=torch.int8)
        weight = torch.full((5, 65_000), -128, dtype=torch.int8)
        one, rows = torch.ones(3, 1), torch.ones(5)
        found = native.int8_gemm(codes, one, weight, rows, None, torch.float32)
        assert (found == 128 * 128 * 65_000).all()

    def test_one_scale_for_all_tokens(self) -> None:
        draw = Draw()
        codes, weight, row_scale = draw.codes(3, 70), draw.codes(9, 70), draw.scales(9)
        operands = (codes, draw.scales(1, 1), weight, row_scale, None)
        exact = reference.int8_gemm(*operands, torch.float64)
        assert_rounded_once(native.int8_gemm(*operands, torch.float32), exact, torch.float32)

    @pytest.mark.parametrize(
        ("width", "groups"),
        [(384, 12), (384, 6), (384, 3), (384, 24), (384, 1), (384, None), (1, None), (97, None)],
    )
    def test_packed(self, width: int, groups: int | None) -> None:
        for tokens in (1, 2, 3, 4, 6):
            check_int4(tokens, 37, width, groups)

    @pytest.mark.parametrize(("bits", "groups"), [(4, 12), (4, 6), (4, 1), (8, 6), (8, 1)])
    def test_float_activations(self, bits: int, groups: int) -> None:
        draw = Draw(bits + groups)
        for tokens in (1, 3, 40):
            packed = draw.codes(37, 384) if bits == 8 else draw.codes(37, 192).view(torch.uint8)
            scale = draw.scales(37, groups).bfloat16()
            operands = (draw.floats(tokens, 384), packed, scale, None, draw.floats(37), bits)
            exact = reference.weight_only_gemm(operands[0].double(), *operands[1:])
            assert_rounded_once(kernels.weight_only_gemm(*operands), exact, torch.float32)

    @pytest.mark.parametrize("width", WIDTHS)
    def test_without_the_processors_own_instructions(self, portable: None, width: int) -> None:
        assert kernels.cpu.is_compiled()
        for tokens in (1, 2, 5):
            check_int8(tokens, 19, width, True, torch.float32)
            check_int4(tokens, 19, width, None)
        check_int4(3, 5, 384, 12)


def every_quantizer(x: Tensor) -> list[kernels.QuantizedInput]:
    rotation = Hadamard.of(96, seed=0)
    factors = (rotation.signs(), *rotation.factors())
    multiplier = torch.tensor([1, 5, 15] * 32, dtype=torch.int8)
    return [
        kernels.quantize_per_token(x, 8),
        kernels.quantize_per_token(x, 4, 0.7, full_range=True),
        kernels.quantize_per_tensor(x, 8),
        kernels.static_quantize(x, torch.tensor(0.1), 4),
        kernels.quantize_smoothed(x, multiplier, 4),
        kernels.quantize_token_groups(x, 4, 32, 0.9),
        kernels.hadamard_quantize(x, *factors, 4, 32),
        kernels.hadamard_quantize(x, *factors, 8),
    ]


class TestQuantizers:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_they_equal_what_a_compiler_traces(
        self, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        x = (Draw().floats(2, 5, 96) * 3).to(dtype)
        compiled = every_quantizer(x)
        monkeypatch.setattr(kernels.cpu, "is_traced", lambda x: True)
        for found, expected in zip(compiled[:6], every_quantizer(x)[:6], strict=True):
            assert torch.equal(found.codes, expected.codes)
            assert torch.equal(found.scale, expected.scale)

    def test_without_the_processors_own_instructions(
        self, monkeypatch: pytest.MonkeyPatch, portable: None
    ) -> None:
        x = Draw().floats(7, 96)
        found = every_quantizer(x)
        monkeypatch.setattr(kernels.cpu, "is_traced", lambda x: True)
        for one, expected in zip(found[:6], every_quantizer(x)[:6], strict=True):
            assert torch.equal(one.codes, expected.codes)
            assert torch.equal(one.scale, expected.scale)

    def test_a_nan_is_not_lost(self) -> None:
        x = Draw().floats(3, 96)
        x[1, 40] = torch.nan
        for quantized in every_quantizer(x)[:2] + every_quantizer(x)[4:]:
            assert quantized.scale.isnan().flatten().tolist() == [False, True, False]

    @pytest.mark.parametrize(
        ("left", "right"), [(1, 1), (1, 8), (1, 256), (2, 16), (12, 8), (12, 64), (20, 16), (4, 80)]
    )
    def test_rotations(self, left: int, right: int) -> None:
        power = right & -right  # right is Sylvester's: what is not a power of two becomes blocks
        blocks, width = right // power, left * right
        draw = Draw(left * right)
        sign = 1 - 2 * draw.codes(width + left * left, lowest=0, highest=1)
        signs, matrix = sign[:width], sign[width:].reshape(left, left)
        sylvester = Hadamard.of(power, seed=0).factors(1)[1]
        x = draw.floats(3, width)
        found = kernels.hadamard(x, signs, matrix, sylvester)
        assert blocks * left * power == width
        exact = reference.hadamard(x.double(), signs, matrix, sylvester)
        assert torch.allclose(found.double(), exact, atol=1e-5)


class TestGradients:
    def test_one_is_refused_not_lost(self) -> None:
        draw = Draw()
        x = draw.floats(2, 64).requires_grad_()
        codes, scale, *_ = kernels.quantize_per_token(x, 8)
        product = kernels.int8_gemm(codes, scale, draw.codes(3, 64), draw.scales(3), None, x.dtype)
        with pytest.raises(RuntimeError, match=r"no gradient|[Aa]utograd"):
            product.sum().backward()


class TestWithoutACompiler:
    def test_it_is_said_once_and_everything_runs(self, not_compiled: None) -> None:
        x = Draw().floats(3, 96)
        with pytest.warns(UserWarning, match="C\\+\\+ compiler with OpenMP"):
            found = kernels.quantize_per_token(x, 8)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert not kernels.cpu.is_compiled()
            check = reference.quantize_per_token(x, 8)
            assert torch.equal(found.codes, check.codes)
            draw = Draw()
            operands = (found.codes, found.scale, draw.codes(5, 96), draw.scales(5), None)
            exact = reference.int8_gemm(*operands, torch.float64)
            result = kernels.int8_gemm(*operands, torch.float32)
            assert_rounded_once(result, exact, torch.float32)


class TestOperands:
    """C++ believes the sizes that it is told: what does not fit them is refused by name."""

    def operands(self) -> dict[str, object]:
        draw = Draw(1)
        return {
            "codes": draw.codes(2, 64),
            "scale": draw.scales(2, 1),
            "weight": draw.codes(5, 64),
            "weight_scale": draw.scales(5),
            "bias": draw.floats(5),
            "dtype": torch.float32,
        }

    @pytest.mark.parametrize("name", ["codes", "scale", "weight", "weight_scale", "bias"])
    def test_a_product_names_what_is_too_short(self, name) -> None:
        operands = self.operands()
        short = operands[name].flatten()[:-1].clone() if name != "scale" else torch.ones(3)
        operands[name] = short if short.dim() == operands[name].dim() else short[None]
        with pytest.raises(ValueError, match=r"operand|not enough values"):
            native.int8_gemm(**operands)

    @pytest.mark.parametrize("name", ["codes", "weight"])
    def test_codes_of_another_dtype_are_no_codes(self, name) -> None:
        operands = self.operands()
        operands[name] = operands[name].float()
        with pytest.raises(ValueError, match=f"operand '{name}' is torch.float32"):
            native.int8_gemm(**operands)

    def test_a_tensor_on_another_device_is_refused(self) -> None:
        operands = self.operands()
        operands["weight_scale"] = operands["weight_scale"].to("meta")
        with pytest.raises(ValueError, match=r"'weight_scale' .* on meta"):
            native.int8_gemm(**operands)

    def test_what_is_not_contiguous_is_read_in_order(self) -> None:
        operands = self.operands()
        expected = native.int8_gemm(**operands)
        operands["weight"] = operands["weight"].t().contiguous().t()
        assert torch.equal(native.int8_gemm(**operands), expected)

    def test_quantizers_name_what_does_not_fit(self) -> None:
        x = torch.randn(3, 96)
        with pytest.raises(ValueError, match="'multiplier'"):
            native.quantize(x, "smoothed", 4, multiplier=torch.ones(95, dtype=torch.int8))
        with pytest.raises(ValueError, match="'scale' is missing"):
            native.quantize(x, "static", 8)
        with pytest.raises(ValueError, match="group_size 36 does not divide 96"):
            native.quantize(x, "groups", 4, group_size=36)
        with pytest.raises(ValueError, match="do not rotate rows of 96"):
            native.rotate(
                x, *(torch.ones(96, dtype=torch.int8), torch.ones(8, 8), torch.ones(8, 8))
            )

    def test_packed_codes_name_what_does_not_fit(self) -> None:
        packed, x = torch.zeros(4, 32, dtype=torch.uint8), torch.randn(2, 64)
        with pytest.raises(ValueError, match="'packed'"):
            native.unpacked(packed, 128, None)
        with pytest.raises(ValueError, match="'multiplier'"):
            native.unpacked(packed, 64, torch.ones(3, 2, dtype=torch.int8))
        with pytest.raises(ValueError, match=r"'packed' is torch.uint8"):
            native.weight_only_gemm(x, packed, torch.ones(4, 1), None, None, 8)
        with pytest.raises(ValueError, match="'weight_scale'"):
            native.weight_only_gemm(x, packed, torch.ones(3, 1), None, None, 4)
