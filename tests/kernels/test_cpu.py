"""The compiled CPU operators: every way to a result is the same result, to the last integer."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from smoothq import kernels
from smoothq.kernels.cpu import native
from smoothq.kernels.reference import multiplied_weight, unpack_int4
from smoothq.transforms.hadamard import Hadamard
from tests.kernels.extremes import EXTREMES
from tests.kernels.test_gemm import Draw, assert_rounded_once

reference = kernels.reference
WIDTHS = (1, 63, 64, 65, 320, 1000)


@pytest.fixture(params=native.isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """A test runs on every instruction set that this processor has."""
    best = native.isa()
    native.use_isa(request.param)
    yield request.param
    native.use_isa(best)


def check_int8(tokens: int, rows: int, width: int, bias: bool, dtype: torch.dtype) -> None:
    draw = Draw(tokens * rows + width)
    codes, weight = draw.codes(tokens, width), draw.codes(rows, width)
    scale, row_scale = draw.scales(tokens, 1), draw.scales(rows)
    operands = (codes, scale, weight, row_scale, draw.floats(rows) if bias else None)
    exact = reference.int8_gemm(*operands, torch.float64)
    result = kernels.int8_gemm(*operands, dtype)
    assert_rounded_once(result, exact, dtype)
    # A compiler's graph reaches the same loops through PyTorch's dispatcher.
    assert torch.equal(result, kernels.int8_gemm.registered(*operands, dtype))


def check_int4(tokens: int, rows: int, width: int, groups: int | None) -> None:
    draw = Draw(tokens * rows + width)
    codes, scale, row_scale = draw.codes(tokens, width), draw.scales(tokens, 1), draw.scales(rows)
    packed = torch.randint(0, 256, (rows, (width + 1) // 2), dtype=torch.uint8)
    multiplier = None if groups is None else draw.multipliers(rows, groups)
    operands = (codes, scale, packed, row_scale, multiplier, None)
    exact = reference.int4_gemm(*operands, torch.float64)
    result = kernels.int4_gemm(*operands, torch.float32)
    assert_rounded_once(result, exact, torch.float32)
    assert torch.equal(result, kernels.int4_gemm.registered(*operands, torch.float32))
    unpacked = multiplied_weight(unpack_int4(packed, width), multiplier)
    assert torch.equal(native.unpacked(packed, width, multiplier), unpacked)


@pytest.mark.usefixtures("isa")
class TestProducts:
    def test_they_are_compiled_here(self, isa: str) -> None:
        assert kernels.cpu.is_compiled()
        assert native.isa() == isa

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
        found = kernels.int8_gemm(codes, one, weight, rows, None, torch.float32)
        assert (found == 128 * 128 * 65_000).all()

    def test_one_scale_for_all_tokens(self) -> None:
        draw = Draw()
        codes, weight, row_scale = draw.codes(3, 70), draw.codes(9, 70), draw.scales(9)
        operands = (codes, draw.scales(1, 1), weight, row_scale, None)
        exact = reference.int8_gemm(*operands, torch.float64)
        assert_rounded_once(kernels.int8_gemm(*operands, torch.float32), exact, torch.float32)

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

    @pytest.mark.parametrize("length", [1, 40])
    def test_groups(self, length: int) -> None:
        draw = Draw(length)
        codes, weight, scale = (
            draw.codes(2, length, 192),
            draw.codes(7, 192),
            draw.scales(2, length, 1),
        )
        bias = draw.floats(7)
        for operands in (
            (codes, scale, None, None, weight, draw.scales(7, 6), None, 32),
            (
                codes,
                scale,
                draw.scales(2, 8),
                draw.orders(2, 192),
                weight,
                draw.scales(7, 1),
                bias,
                24,
            ),
        ):
            exact = reference.group_gemm(*operands, torch.float64)
            assert_rounded_once(kernels.group_gemm(*operands, torch.float32), exact, torch.float32)

    def test_an_order_beyond_the_weight_is_refused(self) -> None:
        draw = Draw()
        order = torch.arange(64).unsqueeze(0) + 1
        with pytest.raises(ValueError, match=r"operand 'order'.*columns below 64"):
            kernels.group_gemm(
                draw.codes(1, 2, 64),
                draw.scales(1, 2, 1),
                draw.scales(1, 1),
                order,
                draw.codes(3, 64),
                draw.scales(3, 1),
                None,
                64,
                torch.float32,
            )

    @pytest.mark.parametrize(("bits", "group_size"), [(8, None), (4, None), (8, 20), (4, 8)])
    def test_attention(self, bits: int, group_size: int | None) -> None:
        draw = Draw(bits)
        query, k, v = draw.floats(2, 6, 3, 40), draw.floats(2, 3, 9, 40), draw.floats(2, 3, 9, 40)
        keys, values = (kernels.quantize_heads(x, bits, group_size) for x in (k, v))
        first, start = draw.floats(2, 3, 2, 40), torch.tensor([-1, 4])
        mask = torch.ones(2, 1, 3, 9, dtype=torch.bool).tril(6)
        mask[1, :, 0] = False
        operands = (keys, values, first, first, start, mask, 0.2, bits, group_size)
        exact = reference.cached_attention(query.double(), *operands)
        result = kernels.cached_attention(query, *operands)
        assert torch.allclose(result.double(), exact, atol=1e-5)
        if group_size is None:
            codes, scale, *_ = kernels.quantize_per_token(query, 8)
            operands = (codes, scale, keys, values, mask, 0.2, bits)
            exact = reference.int8_attention(*operands, torch.float64)
            result = kernels.int8_attention(*operands, torch.float32)
            assert torch.allclose(result.double(), exact, atol=1e-5)


ROTATION = Hadamard.of(96, seed=0)
FACTORS = (ROTATION.signs(), *ROTATION.factors())


def every_quantizer(x: Tensor) -> list[kernels.QuantizedInput]:
    multiplier = torch.tensor([1, 5, 15] * 32, dtype=torch.int8)
    return [
        kernels.quantize_per_token(x, 8),
        kernels.quantize_per_token(x, 4, 0.7, full_range=True),
        kernels.quantize_per_tensor(x, 8),
        kernels.static_quantize(x, torch.tensor(0.1), 4),
        kernels.quantize_smoothed(x, multiplier, 4),
        kernels.quantize_token_groups(x, 4, 32, 0.9),
        kernels.hadamard_quantize(x, *FACTORS, 4, 32),
        kernels.hadamard_quantize(x, *FACTORS, 8),
    ]


@pytest.mark.usefixtures("isa")
class TestQuantizers:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_they_equal_pytorchs_own(
        self, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        x = (Draw().floats(2, 5, 96) * 3).to(dtype)
        compiled = every_quantizer(x)
        monkeypatch.setattr(kernels.cpu, "is_compiled", lambda: False)
        for found, expected in zip(compiled[:6], every_quantizer(x)[:6], strict=True):
            assert torch.equal(found.codes, expected.codes)
            assert torch.equal(found.scale, expected.scale)

    @pytest.mark.parametrize("values", EXTREMES)
    def test_extremes(self, values: str) -> None:
        x = EXTREMES[values]
        multiplier = torch.tensor([1, 5, 15] * 8, dtype=torch.int8)
        for name, *rest in (
            ("quantize_per_token", 4, 0.25),
            ("quantize_per_token", 8, 1.0, True),
            ("quantize_per_tensor", 8),
            ("static_quantize", torch.tensor(0.1), 4),
            ("quantize_smoothed", multiplier, 4),
            ("quantize_token_groups", 4, 8),
        ):
            result, expected = getattr(kernels, name)(x, *rest), getattr(reference, name)(x, *rest)
            assert torch.equal(result.codes, expected.codes), name
            assert torch.equal(result.scale.nan_to_num(-1), expected.scale.nan_to_num(-1)), name

    def test_a_compilers_graph_gives_the_same(self) -> None:
        x = Draw().floats(2, 5, 96)
        compiled = torch.compile(every_quantizer, fullgraph=True, backend="aot_eager")
        for found, expected in zip(compiled(x), every_quantizer(x), strict=True):
            assert torch.equal(found.codes, expected.codes)
            assert torch.equal(found.scale, expected.scale)

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


IN_A_FRESH_PROCESS = """
import sys
sys.modules["smoothq.kernels.cpu._operators"] = None  # as where nothing was built
import torch
from smoothq import kernels
x = torch.randn(3, 96)
found, check = kernels.quantize_per_token(x, 8), kernels.reference.quantize_per_token(x, 8)
assert torch.equal(found.codes, check.codes)
operands = (*found[:2], torch.ones(5, 96, dtype=torch.int8), torch.ones(5), None)
exact = kernels.reference.int8_gemm(*operands, torch.float64)
assert torch.allclose(kernels.int8_gemm(*operands, torch.float32).double(), exact, rtol=1e-6)
print(kernels.cpu.native.isa())
"""


class TestWithoutTheLibrary:
    @pytest.mark.parametrize(
        ("choice", "says"),
        [
            ("", "RuntimeError: smoothq was installed without its CPU operators"),
            ("pytorch", "pytorch\n"),
        ],
    )
    def test_a_missing_one_is_an_error_by_name_and_pytorch_a_choice(
        self, choice: str, says: str
    ) -> None:
        result = subprocess.run(
            [sys.executable, "-c", IN_A_FRESH_PROCESS],
            env={**os.environ, native.CHOICE: choice},
            capture_output=True,
            text=True,
        )
        assert says in result.stdout + result.stderr

    @pytest.mark.slow
    def test_a_checkout_in_the_current_directory_is_not_loaded_beside_it(self, tmp_path) -> None:
        """transformers imports a package called `kernels` where it finds one."""
        shutil.copytree(Path(kernels.__file__).parent, tmp_path / "kernels")
        program = "import kernels, smoothq.kernels as ours; print(ours.cpu.is_compiled())"
        result = subprocess.run(
            [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True
        )
        assert result.stdout == "True\n", result.stderr

    def test_an_instruction_set_that_is_not_here_is_refused(self) -> None:
        with pytest.raises(ValueError, match="no_such_isa is not of this processor, which has: "):
            native.use_isa("no_such_isa")


@pytest.mark.usefixtures("isa")
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
        with pytest.raises(ValueError, match=r"operand|is not a matrix"):
            kernels.int8_gemm(*operands.values())

    @pytest.mark.parametrize("name", ["codes", "weight"])
    def test_codes_of_another_dtype_are_no_codes(self, name) -> None:
        operands = self.operands()
        operands[name] = operands[name].float()
        with pytest.raises(ValueError, match=f"operand '{name}' is float32"):
            kernels.int8_gemm(*operands.values())

    def test_a_tensor_on_another_device_is_refused(self) -> None:
        operands = self.operands()
        operands["weight_scale"] = operands["weight_scale"].to("meta")
        with pytest.raises(ValueError, match=r"'weight_scale' .* on another device"):
            kernels.int8_gemm(*operands.values())

    def test_what_is_not_contiguous_is_read_in_order(self) -> None:
        operands = self.operands()
        expected = kernels.int8_gemm(*operands.values())
        operands["weight"] = operands["weight"].t().contiguous().t()
        assert torch.equal(kernels.int8_gemm(*operands.values()), expected)

    def test_quantizers_name_what_does_not_fit(self) -> None:
        x = torch.randn(3, 96)
        with pytest.raises(ValueError, match="'multiplier'"):
            native.quantize(x, "smoothed", 4, multiplier=torch.ones(95, dtype=torch.int8))
        with pytest.raises(ValueError, match="'scale' is missing"):
            native.quantize(x, "static", 8)
        with pytest.raises(ValueError, match="group_size 36 does not divide 96"):
            native.quantize(x, "groups", 4, group_size=36)
        with pytest.raises(ValueError, match="do not rotate rows of 96"):
            native.rotate(x, *(torch.ones(n, dtype=torch.int8) for n in ((96,), (8, 8), (8, 8))))

    def test_packed_codes_name_what_does_not_fit(self) -> None:
        packed, x = torch.zeros(4, 32, dtype=torch.uint8), torch.randn(2, 64)
        with pytest.raises(ValueError, match="'packed'"):
            native.unpacked(packed, 128, None)
        with pytest.raises(ValueError, match="'multiplier'"):
            native.unpacked(packed, 64, torch.ones(3, 2, dtype=torch.int8))
        with pytest.raises(ValueError, match="'packed' is uint8"):
            kernels.weight_only_gemm(x, packed, torch.ones(4, 1), None, None, 8)
        with pytest.raises(ValueError, match="'weight_scale'"):
            kernels.weight_only_gemm(x, packed, torch.ones(3, 1), None, None, 4)
