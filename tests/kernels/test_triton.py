"""Every Triton operator against its reference definition: on a GPU, else in Triton's interpreter.

Quantizers give the very integers and scales of the reference. Integer sums are exact; a float
result is computed in float32 and rounded once to its dtype. The operands lie on DEVICE, what they
should give is computed on the CPU.
"""

import importlib
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from smoothq import kernels
from smoothq.kernels import QuantizedInput, reference, tuning
from smoothq.rounding.packing import pack
from smoothq.transforms.hadamard import Hadamard
from tests.kernels.extremes import EXTREMES
from tests.kernels.test_fp_gemm import fp_weight, word_weight
from tests.kernels.test_gemm import Draw, assert_rounded_once, weight_only_operands
from tests.kernels.test_quantizers import activations

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from smoothq.kernels import triton as operators  # noqa: E402
from smoothq.kernels.triton import launch, quantize, runtime_smooth  # noqa: E402

weight_only_gemm = importlib.import_module("smoothq.kernels.triton.weight_only_gemm")

# The package binds the operators to the names of these modules.
integer, grouped, weight_only, rotations, attention, floating, fp_quantizers = (
    importlib.import_module(f"smoothq.kernels.triton.{name}")
    for name in (
        *("integer_gemm", "group_gemm", "weight_only_gemm", "hadamard", "attention"),
        *("fp_gemm", "fp_quantize"),
    )
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

each_backend = pytest.mark.parametrize("backend", ["cpu", "triton"])
each_dtype = pytest.mark.parametrize("dtype", DTYPES)
each_output = pytest.mark.parametrize(
    ("dtype", "biased"),
    [(torch.float32, False), (torch.float32, True), (torch.bfloat16, True), (torch.float16, False)],
)
each_width = pytest.mark.parametrize("bits", [4, 8])
# Every dtype at both widths, clipped and not.
each_grid = pytest.mark.parametrize(
    ("dtype", "bits", "clip"),
    [
        *[(torch.float32, 4, 1.0), (torch.float32, 8, 0.9)],
        *[(torch.bfloat16, 4, 0.5), (torch.bfloat16, 8, 1.0)],
        *[(torch.float16, 4, 1.0), (torch.float16, 8, 0.5)],
    ],
)
# Multipliers stand beside codes of 6 bits at most.
each_multiplied_grid = pytest.mark.parametrize(
    ("dtype", "bits", "clip"),
    [(torch.float32, 4, 1.0), (torch.bfloat16, 6, 0.5), (torch.float16, 5, 0.9)],
)
# Of an integer product: the dtype, a bias or none, a scale a token or one for all.
each_form = pytest.mark.parametrize(
    ("dtype", "biased", "per_token"),
    [
        *[(torch.float32, False, True), (torch.float32, True, False)],
        *[(torch.bfloat16, True, True), (torch.float16, False, False)],
    ],
)
# Tokens, rows, width: none of them a multiple of a tile; up to 16 tokens are a product of its own.
each_product = pytest.mark.parametrize(
    ("tokens", "rows", "width"),
    [(1, 5, 1), (3, 33, 33), (17, 70, 129), (33, 5, 200), (17, 33, 301), (3, 70, 1120)],
)


@pytest.fixture(autouse=True)
def fresh_tensors_hold_garbage(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel leaves unwritten is NaN or 99, and so does not pass for a result."""
    empty = torch.empty

    def filled(*args: Any, **kwargs: Any) -> Tensor:
        fresh = empty(*args, **kwargs)
        return fresh.fill_(math.nan if fresh.is_floating_point() else 99)

    monkeypatch.setattr(torch, "empty", filled)


@pytest.fixture(autouse=True)
def bfloat16_is_rounded_to_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: Triton's interpreter cuts the lower half of a float32 off."""
    if not launch.INTERPRETED:
        return
    interpreter = importlib.import_module("triton.runtime.interpreter")
    convert = interpreter._convert_float

    def rounded(values: Any, source: tl.dtype, target: tl.dtype, mode: Any) -> Any:
        if source == tl.float32 and target == tl.bfloat16:
            return torch.tensor(values).bfloat16().view(torch.uint16).numpy()
        return convert(values, source, target, mode)

    monkeypatch.setattr(interpreter, "_convert_float", rounded)


def take_only(
    monkeypatch: pytest.MonkeyPatch, module: Any, launcher: str, kernel: str, tile: triton.Config
) -> None:
    """Let an operator run with one tile, whatever it would choose; skip where a GPU cannot."""

    class Forced(launch.Tuned):
        def launch(self, *args: Any, **kwargs: Any) -> None:
            try:
                super().launch(*args, **kwargs)
            except triton.OutOfResources as error:
                pytest.skip(str(error))

    monkeypatch.setattr(module, launcher, Forced(getattr(module, kernel), {"": tile}, []))


@pytest.fixture(autouse=True)
def only_the_first_tile_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the interpreter: a GPU would compile and time every tile for each of these shapes."""
    if launch.INTERPRETED:
        return
    for module, launcher, kernel, tiles in (
        (integer, "_prefill_kernel", "_integer_kernel", integer.PREFILL_TILES),
        (integer, "_decode_kernel", "_integer_kernel", integer.DECODE_TILES),
        (grouped, "_kernel", "_group_kernel", grouped.TILES),
        (weight_only, "_prefill_kernel", "_weight_only_kernel", weight_only.PREFILL_TILES),
        (weight_only, "_decode_kernel", "_weight_only_kernel", weight_only.DECODE_TILES),
        (floating, "_prefill_kernel", "_fp_kernel", floating.PREFILL_TILES),
        (floating, "_decode_kernel", "_fp_kernel", floating.DECODE_TILES),
        (attention, "_prefill_kernel", "_attention_kernel", attention.PREFILL_TILES),
        (attention, "_decode_kernel", "_attention_kernel", attention.DECODE_TILES),
    ):
        take_only(monkeypatch, module, launcher, kernel, next(iter(tiles.values())))


def on_device(operand: Any) -> Any:
    if isinstance(operand, list):
        return [on_device(member) for member in operand]
    return operand.to(DEVICE) if isinstance(operand, Tensor) else operand


def run(name: str, *operands: Any, **named: Any) -> Any:
    """An operator's result for operands of the CPU, there again."""
    placed = [on_device(operand) for operand in operands]
    result = getattr(operators, name)(
        *placed, **{key: on_device(operand) for key, operand in named.items()}
    )
    if isinstance(result, Tensor):
        return result.cpu()
    return QuantizedInput(*(None if part is None else part.cpu() for part in result))


def on(backend: str, name: str, *operands: Any) -> Any:
    """An operator's result by a backend: `cpu`, or `triton`."""
    return run(name, *operands) if backend == "triton" else getattr(kernels, name)(*operands)


def assert_same(found: QuantizedInput, expected: QuantizedInput) -> None:
    """Codes, scales and order to the last bit."""
    for part, one, other in zip(QuantizedInput._fields, found, expected, strict=True):
        assert (one is None) == (other is None), part
        if one is not None and other is not None:
            assert one.dtype == other.dtype, part
            assert one.shape == other.shape, part
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True, msg=part)


def assert_quantized_alike(name: str, *operands: Any, **named: Any) -> None:
    """The operator gives what its definition gives."""
    expected = getattr(reference, name)(*operands, **named)
    assert_same(run(name, *operands, **named), expected)


def assert_multiplied_alike(name: str, *operands: Any) -> None:
    """The operator, its dtype the last operand, gives its definition's product."""
    *others, dtype = operands
    exact = getattr(reference, name)(*others, torch.float64)
    assert_rounded_once(run(name, *operands), exact, dtype)


def widest_codes(draw: Draw, rows: int, width: int) -> Tensor:
    """4-bit codes down to −8."""
    return draw.codes(rows, width, lowest=-8, highest=7)


class TestGarbage:
    def test_it_is_what_the_operators_are_given(self) -> None:
        codes, scale = quantize.empty_quantized(torch.ones(2, 3, device=DEVICE))
        assert bool((codes == 99).all())
        assert bool(scale.isnan().all())


class TestQuantizers:
    shapes = pytest.mark.parametrize(
        "shape", [(1, 1), (3, 33), (5, 129), (2, 3, 200), (17, 301), (3, 1120), (24,)], ids=str
    )

    @shapes
    @each_grid
    @pytest.mark.parametrize("full_range", [False, True])
    def test_per_token(
        self, shape: tuple[int, ...], dtype: torch.dtype, bits: int, clip: float, full_range: bool
    ) -> None:
        x = activations(*shape, dtype=dtype)
        assert_quantized_alike("quantize_per_token", x, bits, clip, full_range)

    @shapes
    @each_grid
    def test_per_tensor(
        self, shape: tuple[int, ...], dtype: torch.dtype, bits: int, clip: float
    ) -> None:
        assert_quantized_alike("quantize_per_tensor", activations(*shape, dtype=dtype), bits, clip)

    @shapes
    @each_width
    @each_dtype
    def test_static(self, shape: tuple[int, ...], bits: int, dtype: torch.dtype) -> None:
        x = activations(*shape, dtype=dtype)
        assert_quantized_alike("static_quantize", x, torch.tensor(0.037), bits)

    @pytest.mark.parametrize("scale_dtype", DTYPES)
    @pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
    def test_static_with_a_scale_of_any_shape(
        self, shape: tuple[int, ...], scale_dtype: torch.dtype
    ) -> None:
        scale = torch.full(shape, 0.037, dtype=scale_dtype)
        assert_quantized_alike("static_quantize", activations(3, 33), scale, 8)

    @pytest.mark.parametrize(
        ("shape", "size"),
        [
            ((1, 1), 1),
            ((3, 33), 11),
            ((5, 129), 43),
            ((2, 3, 200), 8),
            ((5, 200), 200),
            ((3, 301), 7),
            ((3, 1120), 160),
            ((24,), 1),
        ],
        ids=str,
    )
    @each_multiplied_grid
    def test_token_groups(
        self, shape: tuple[int, ...], size: int, dtype: torch.dtype, bits: int, clip: float
    ) -> None:
        x = activations(*shape, dtype=dtype)
        assert_quantized_alike("quantize_token_groups", x, bits, size, clip)

    @shapes
    @each_multiplied_grid
    def test_smoothed_by_a_multiplier_a_channel(
        self, shape: tuple[int, ...], dtype: torch.dtype, bits: int, clip: float
    ) -> None:
        x = activations(*shape, dtype=dtype)
        largest = reference.largest_multiplier(bits)
        multiplier = Draw().codes(shape[-1], lowest=1, highest=largest)
        assert_quantized_alike("quantize_smoothed", x, multiplier, bits, clip)

    @pytest.mark.parametrize("batch", [1, 3])
    @pytest.mark.parametrize(("length", "width"), [(1, 33), (5, 129), (3, 1120)])
    @each_dtype
    def test_smoothed_by_a_multiplier_a_sequence_and_channel(
        self, batch: int, length: int, width: int, dtype: torch.dtype
    ) -> None:
        x = activations(batch, length, width, dtype=dtype)
        multiplier = Draw().codes(batch, 1, width, lowest=1, highest=15)
        assert_quantized_alike("quantize_smoothed", x, multiplier, 4)

    @pytest.mark.parametrize("shape", [(1,), (33,), (3, 129), (2, 3, 200), (2, 1120)], ids=str)
    @pytest.mark.parametrize("bits", [4, 6])
    @each_dtype
    def test_channel_multipliers(
        self, shape: tuple[int, ...], bits: int, dtype: torch.dtype
    ) -> None:
        scale = activations(*shape).abs().to(dtype)
        scale[..., ::5] = 0  # dead channels
        found = run("channel_multipliers", scale, bits)
        expected = reference.channel_multipliers(scale, bits)
        assert found.dtype == torch.int8
        assert torch.equal(found, expected)


OF_24_CHANNELS: dict[str, tuple[str, tuple[Any, ...]]] = {
    "per token": ("quantize_per_token", (4,)),
    "per token, clipped": ("quantize_per_token", (4, 0.25)),
    "per token, 8 bits": ("quantize_per_token", (8,)),
    "per tensor": ("quantize_per_tensor", (4,)),
    "static": ("static_quantize", (torch.tensor(1.0), 4)),
    "static, 8 bits": ("static_quantize", (torch.tensor(1e-3), 8)),
    "token groups": ("quantize_token_groups", (4, 8)),
    "token groups, clipped": ("quantize_token_groups", (4, 3, 0.25)),
    "smoothed": ("quantize_smoothed", (Draw().codes(24, lowest=1, highest=15), 4)),
}


class TestExtremes:
    @pytest.mark.parametrize("values", EXTREMES)
    @pytest.mark.parametrize("quantizer", OF_24_CHANNELS)
    @pytest.mark.filterwarnings("ignore:overflow encountered in divide")  # NumPy's, then clamped
    def test_the_same_codes(self, values: str, quantizer: str) -> None:
        name, rest = OF_24_CHANNELS[quantizer]
        assert_quantized_alike(name, EXTREMES[values], *rest)

    @pytest.mark.parametrize("values", EXTREMES)
    @pytest.mark.parametrize("size", [1, 8])
    @pytest.mark.parametrize("normalise", [False, True])
    def test_the_same_codes_over_a_sequence(self, values: str, size: int, normalise: bool) -> None:
        x = EXTREMES[values].unsqueeze(0)
        assert_quantized_alike("runtime_smooth_quantize", x, 4, size, normalise=normalise)


class TestRuntimeSmooth:
    """Over 16 tokens the maxima of several programs meet."""

    @pytest.mark.parametrize(
        ("batch", "length", "width", "size"),
        [
            *[(1, 1, 1, 1), (2, 17, 33, 1), (1, 17, 129, 1), (1, 3, 1120, 1)],
            *[(1, 1, 33, 3), (2, 3, 33, 33), (1, 33, 200, 8), (2, 3, 301, 43), (1, 3, 1120, 32)],
        ],
    )
    @pytest.mark.parametrize(
        ("masked", "normalise", "dtype"),
        [
            *[(False, False, torch.float32), (True, True, torch.float32)],
            *[(False, True, torch.bfloat16), (True, False, torch.float16)],
        ],
    )
    def test_reference(
        self,
        batch: int,
        length: int,
        width: int,
        size: int,
        masked: bool,
        normalise: bool,
        dtype: torch.dtype,
    ) -> None:
        x = activations(batch, length, width, dtype=dtype)
        mask = None
        if masked:
            mask = torch.ones(batch, length, dtype=torch.bool)
            mask[0, : length // 2] = False
            mask[-1, -1] = False
            x[0, : length // 2] *= 30
        assert_quantized_alike("runtime_smooth_quantize", x, 4, size, 1.0, mask, normalise)

    @pytest.mark.parametrize("size", [1, 12])
    @each_multiplied_grid
    def test_bits_and_clipping(self, size: int, dtype: torch.dtype, bits: int, clip: float) -> None:
        x = activations(2, 3, 24, dtype=dtype)
        assert_quantized_alike("runtime_smooth_quantize", x, bits, size, clip, normalise=True)

    @pytest.mark.parametrize("size", [1, 12])
    def test_a_sequence_of_padding_alone(self, size: int) -> None:
        mask = torch.tensor([[True] * 17, [False] * 17])
        assert_quantized_alike(
            "runtime_smooth_quantize", activations(2, 17, 24), 4, size, mask=mask
        )

    def test_channels_of_the_same_maximum_keep_their_order(self) -> None:
        x = torch.ones(1, 3, 33)
        x[..., 20:] = 2
        assert_quantized_alike("runtime_smooth_quantize", x, 4, 11)


class TestInt8Gemm:
    @each_product
    @each_form
    def test_reference(
        self,
        tokens: int,
        rows: int,
        width: int,
        dtype: torch.dtype,
        biased: bool,
        per_token: bool,
    ) -> None:
        draw = Draw()
        assert_multiplied_alike(
            "int8_gemm",
            draw.codes(tokens, width),
            draw.scales(tokens if per_token else 1, 1),
            draw.codes(rows, width),
            draw.scales(rows),
            draw.floats(rows).to(dtype) if biased else None,
            dtype,
        )

    @pytest.mark.parametrize("width", [1, 63, 64, 65, 1024, 1025, 2049])
    @pytest.mark.parametrize(("left", "right"), [(-128, -128), (-128, 127), (127, 127)])
    def test_the_largest_sums_are_rounded_once(self, width: int, left: int, right: int) -> None:
        a = torch.full((33, width), left, dtype=torch.int8)
        w = torch.full((5, width), right, dtype=torch.int8)
        w[1, -1] = 1
        found = run(
            "int8_gemm", a, torch.full((1, 1), 0.5), w, torch.full((5,), 2.0), None, torch.float32
        )
        assert torch.equal(found, (a.long() @ w.long().t()).float())


def multiplied_operands(
    draw: Draw, tokens: int, rows: int, width: int, groups: int
) -> tuple[Tensor, ...]:
    """Codes, a scale a token, packed weight codes, their scales and multipliers."""
    return (
        draw.codes(tokens, width),
        draw.scales(tokens, 1),
        pack(draw.codes(rows, width, lowest=-8, highest=7), 4),
        draw.scales(rows),
        draw.multipliers(rows, groups),
    )


class TestInt4Gemm:
    @each_product
    @each_form
    def test_one_scale_a_row(
        self,
        tokens: int,
        rows: int,
        width: int,
        dtype: torch.dtype,
        biased: bool,
        per_token: bool,
    ) -> None:
        draw = Draw()
        assert_multiplied_alike(
            "int4_gemm",
            draw.codes(tokens, width),
            draw.scales(tokens if per_token else 1, 1),
            pack(widest_codes(draw, rows, width), 4),
            draw.scales(rows),
            None,
            draw.floats(rows).to(dtype) if biased else None,
            dtype,
        )

    @pytest.mark.parametrize(
        ("size", "groups"),
        [
            *[(32, 1), (32, 7), (64, 5), (96, 1), (96, 3), (96, 4), (128, 3), (160, 3), (256, 2)],
            *[(1, 1), (33, 1), (301, 1)],  # one multiplier a row: any width
        ],
    )
    @pytest.mark.parametrize(
        ("tokens", "rows", "dtype"),
        [
            *[(3, 33, torch.float32), (17, 70, torch.float32)],
            *[(3, 70, torch.bfloat16), (17, 33, torch.float16)],
        ],
    )
    def test_multipliers(
        self, size: int, groups: int, tokens: int, rows: int, dtype: torch.dtype
    ) -> None:
        draw = Draw()
        operands = multiplied_operands(draw, tokens, rows, size * groups, groups)
        bias = draw.floats(rows).to(dtype) if groups % 2 else None
        assert_multiplied_alike("int4_gemm", *operands, bias, dtype)

    @pytest.mark.parametrize("tokens", [3, 33])
    @pytest.mark.parametrize("width", [1, 31, 32, 33, 63, 64, 65, 95, 96, 97, 127, 128, 129])
    def test_the_sum_is_exact_wherever_the_last_block_ends(self, tokens: int, width: int) -> None:
        draw = Draw(width)
        a, w = draw.codes(tokens, width), widest_codes(draw, 33, width)
        scales = torch.full((1, 1), 0.5), torch.full((33,), 2.0)
        found = run("int4_gemm", a, scales[0], pack(w, 4), scales[1], None, None, torch.float32)
        assert torch.equal(found.long(), a.long() @ w.long().t())

    @pytest.mark.parametrize("tokens", [3, 33])
    @pytest.mark.parametrize("size", [32, 64, 96, 128, 160])
    def test_the_sum_times_multipliers_is_exact(self, tokens: int, size: int) -> None:
        draw = Draw(size)
        a, w = draw.codes(tokens, 3 * size), draw.codes(33, 3 * size, lowest=-8, highest=7)
        multiplier = draw.multipliers(33, 3)
        scales = torch.ones(1, 1), torch.ones(33)
        found = run(
            "int4_gemm", a, scales[0], pack(w, 4), scales[1], multiplier, None, torch.float32
        )
        multiplied = w.long() * multiplier.long().repeat_interleave(size, 1)
        assert torch.equal(found.long(), a.long() @ multiplied.t())

    @pytest.mark.parametrize("size", [8, 16, 24, 48, 72, 100])
    def test_groups_that_do_not_fit_the_blocks_are_refused(self, size: int) -> None:
        assert not operators.packed_tokens("int4_gemm", size)
        operands = multiplied_operands(Draw(), 3, 5, 4 * size, 4)
        with pytest.raises(NotImplementedError, match=rf"int4_gemm: groups of {size} .*int8_gemm"):
            run("int4_gemm", *operands, None, torch.float32)

    def test_groups_that_fit(self) -> None:
        assert operators.packed_tokens("int4_gemm", None)
        assert all(operators.packed_tokens("int4_gemm", size) for size in (32, 64, 96, 128, 160))


class TestSplits:
    """Few tokens and a long K: several programs a tile, whose sums a second kernel adds."""

    @pytest.mark.parametrize(("tokens", "biased"), [(1, False), (16, True)])
    @pytest.mark.parametrize(
        ("rows", "width", "parts"), [(70, 1025, 2), (33, 2112, 4), (5, 4133, 8)]
    )
    @pytest.mark.parametrize("packed", [False, True], ids=["int8", "packed"])
    def test_the_sum_is_the_same(
        self, tokens: int, biased: bool, rows: int, width: int, parts: int, packed: bool
    ) -> None:
        assert integer.splits(torch.device(DEVICE), tokens, rows, width) == parts
        draw = Draw()
        a = draw.codes(tokens, width)
        w = widest_codes(draw, rows, width) if packed else draw.codes(rows, width)
        scale, weight_scale = 2.0 ** draw.codes(tokens, 1, lowest=-2, highest=2), torch.ones(rows)
        bias = draw.codes(rows).float() if biased else None
        rest = (None, bias, torch.float32) if packed else (bias, torch.float32)
        name = "int4_gemm" if packed else "int8_gemm"
        found = run(name, a, scale, pack(w, 4) if packed else w, weight_scale, *rest)
        expected = (a.long() @ w.long().t()) * scale
        assert torch.equal(found, expected if bias is None else expected + bias)

    @pytest.mark.parametrize(
        ("size", "dtype"),
        [
            *[(32, torch.float32), (64, torch.bfloat16), (96, torch.float16)],
            *[(96, torch.float32), (128, torch.bfloat16), (160, torch.float32)],
        ],
    )
    def test_with_multipliers(self, size: int, dtype: torch.dtype) -> None:
        width = 1200 // size * size
        assert integer.splits(torch.device(DEVICE), 3, 33, width) > 1
        draw = Draw()
        operands = multiplied_operands(draw, 3, 33, width, width // size)
        assert_multiplied_alike("int4_gemm", *operands, draw.floats(33), dtype)

    @each_dtype
    def test_one_scale_for_all_tokens(self, dtype: torch.dtype) -> None:
        assert integer.splits(torch.device(DEVICE), 3, 70, 1100) > 1
        draw = Draw()
        operands = (draw.codes(3, 1100), draw.scales(1, 1), draw.codes(70, 1100), draw.scales(70))
        assert_multiplied_alike("int8_gemm", *operands, draw.floats(70), dtype)

    def test_many_tokens_or_a_short_k_are_not_split(self) -> None:
        device = torch.device(DEVICE)
        assert integer.splits(device, 17, 5, 100_000) == 1
        assert integer.splits(device, 1, 5, 1023) == 1
        assert integer.splits(device, 1, 1, 1_000_000) == 16


GROUP_FORMS = ["blocks, ordered", "blocks", "weight groups", "weight groups and blocks"]


def group_operands(
    draw: Draw, batch: int, length: int, rows: int, size: int, groups: int, form: str
) -> tuple[Tensor | None, ...]:
    """Codes, a scale a token, factors of blocks, an order, weight codes and their scales."""
    width = size * groups
    return (
        draw.codes(batch, length, width),
        draw.scales(batch, length, 1),
        draw.scales(batch, groups) * 100 if "blocks" in form else None,
        draw.orders(batch, width) if "ordered" in form else None,
        draw.codes(rows, width),
        draw.scales(rows, groups if form.startswith("weight groups") else 1),
    )


class TestGroupGemm:
    @pytest.mark.parametrize(
        ("size", "groups", "batch", "length", "rows"),
        [(12, 5, 1, 1, 5), (32, 5, 3, 17, 33), (160, 2, 1, 33, 33), (256, 2, 2, 3, 70)],
    )
    @pytest.mark.parametrize("form", GROUP_FORMS)
    @each_output
    def test_reference(
        self,
        size: int,
        groups: int,
        batch: int,
        length: int,
        rows: int,
        form: str,
        dtype: torch.dtype,
        biased: bool,
    ) -> None:
        draw = Draw()
        operands = group_operands(draw, batch, length, rows, size, groups, form)
        bias = draw.floats(rows).to(dtype) if biased else None
        assert_multiplied_alike("group_gemm", *operands, bias, size, dtype)

    @pytest.mark.parametrize("form", GROUP_FORMS)
    @pytest.mark.parametrize(("batch", "length"), [(1, 1), (1, 17), (3, 1), (2, 33)])
    def test_one_scale_for_all_tokens(self, form: str, batch: int, length: int) -> None:
        draw = Draw()
        codes, _, *rest = group_operands(draw, batch, length, 33, 12, 3, form)
        operands = (codes, draw.scales(1, 1, 1), *rest, draw.floats(33), 12)
        assert_multiplied_alike("group_gemm", *operands, torch.float32)

    @pytest.mark.parametrize("size", [1, 7, 31, 33, 64, 127, 128, 129, 301])
    @pytest.mark.parametrize("groups", [1, 3])
    def test_any_group_size(self, size: int, groups: int) -> None:
        operands = group_operands(Draw(), 2, 3, 33, size, groups, "weight groups and blocks")
        assert_multiplied_alike("group_gemm", *operands, None, size, torch.float32)

    @pytest.mark.parametrize("form", GROUP_FORMS)
    @pytest.mark.parametrize("scale_dtype", DTYPES[1:])
    def test_weight_scales_of_16_bits(self, form: str, scale_dtype: torch.dtype) -> None:
        draw = Draw()
        *operands, weight_scale = group_operands(draw, 2, 5, 9, 32, 3, form)
        assert weight_scale is not None
        operands.append(weight_scale.to(scale_dtype))
        assert_multiplied_alike("group_gemm", *operands, draw.floats(9), 32, torch.float32)

    @pytest.mark.parametrize("length", [1, 17, 64])
    @pytest.mark.parametrize("form", GROUP_FORMS)
    def test_powers_of_two_as_scales_leave_the_integers(self, length: int, form: str) -> None:
        draw = Draw()
        codes, _, _, order, weight, _ = group_operands(draw, 2, length, 33, 96, 3, form)
        assert codes is not None
        assert weight is not None
        ones = torch.ones(33, 3 if form.startswith("weight groups") else 1)
        blocks = torch.tensor([[0.5, 2.0, 4.0], [1.0, 0.25, 8.0]]) if "blocks" in form else None
        operands = (codes, torch.full((1, 1, 1), 4.0), blocks, order, weight, ones, None, 96)
        found = run("group_gemm", *operands, torch.float32)
        exact = reference.group_gemm(*operands, torch.float64)
        assert torch.equal(found.double(), exact)

    def test_what_runtime_smoothing_gives(self) -> None:
        draw = Draw()
        x, weight, weight_scale = draw.floats(2, 17, 96), draw.codes(33, 96), draw.scales(33, 1)
        quantized = run("runtime_smooth_quantize", x, 8, 32)
        found = run("group_gemm", *quantized, weight, weight_scale, None, 32, torch.float32)
        exact = x.double() @ (weight.double() * weight_scale.double()).t()
        assert (found - exact).pow(2).mean().sqrt() < 0.02 * exact.pow(2).mean().sqrt()


def assert_weight_only_alike(x: Tensor, *operands: Any) -> None:
    exact = reference.weight_only_gemm(x.double(), *operands)
    assert_rounded_once(run("weight_only_gemm", x, *operands), exact, x.dtype)


class TestWeightOnlyGemm:
    @each_product
    @each_width
    @each_output
    def test_one_scale_a_row(
        self, tokens: int, rows: int, width: int, bits: int, dtype: torch.dtype, biased: bool
    ) -> None:
        draw = Draw()
        x, *weight = weight_only_operands(draw, tokens, rows, width, bits, 1, multiplied=False)
        bias = draw.floats(rows).to(dtype) if biased else None
        assert_weight_only_alike(x.to(dtype), *weight, bias, bits)

    @pytest.mark.parametrize("bits", [4, 8])
    @pytest.mark.parametrize(("tokens", "width"), [(3, 64), (17, 301), (3, 1), (33, 200)])
    def test_one_scale_a_row_where_no_sum_is_carried(
        self, tokens: int, width: int, bits: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As on Hopper."""
        monkeypatch.setattr(weight_only_gemm, "carries_float_sums", lambda device: False)
        x, *weight = weight_only_operands(Draw(), tokens, 33, width, bits, 1, multiplied=False)
        assert_weight_only_alike(x, *weight, None, bits)

    @pytest.mark.parametrize(
        ("size", "groups"),
        [(32, 2), (32, 7), (64, 3), (96, 3), (96, 4), (128, 3), (160, 3), (301, 1)],
    )
    @pytest.mark.parametrize(
        ("bits", "multiplied", "tokens", "rows", "dtype"),
        [
            *[(4, False, 17, 33, torch.float32), (4, False, 3, 33, torch.bfloat16)],
            *[(4, True, 3, 33, torch.float32), (4, True, 17, 5, torch.bfloat16)],
            *[(4, True, 3, 5, torch.float16), (8, True, 17, 5, torch.float32)],
            *[(8, False, 3, 33, torch.float16), (8, False, 17, 5, torch.bfloat16)],
        ],
    )
    def test_groups(
        self,
        size: int,
        groups: int,
        bits: int,
        multiplied: bool,
        tokens: int,
        rows: int,
        dtype: torch.dtype,
    ) -> None:
        draw = Draw()
        x, *weight = weight_only_operands(
            draw, tokens, rows, size * groups, bits, groups, multiplied
        )
        bias = draw.floats(rows).to(dtype) if groups % 2 else None
        assert_weight_only_alike(x.to(dtype), *weight, bias, bits)

    @pytest.mark.parametrize(("size", "groups"), [(1, 5), (7, 3), (43, 3), (65, 2)])
    @pytest.mark.parametrize(
        ("tokens", "multiplied"), [(3, False), (17, True)], ids=["float scales", "multipliers"]
    )
    @each_dtype
    def test_8_bits_in_odd_groups(
        self, size: int, groups: int, tokens: int, multiplied: bool, dtype: torch.dtype
    ) -> None:
        x, *weight = weight_only_operands(Draw(), tokens, 33, size * groups, 8, groups, multiplied)
        assert_weight_only_alike(x.to(dtype), *weight, None, 8)

    @pytest.mark.parametrize(
        ("tokens", "dtype"), [(1, torch.float32), (17, torch.bfloat16), (3, torch.float16)]
    )
    @pytest.mark.parametrize("width", [1, 31, 32, 33, 63, 64, 65, 95, 96, 97, 127, 128, 129])
    def test_integers_are_exact_wherever_the_last_block_ends(
        self, tokens: int, dtype: torch.dtype, width: int
    ) -> None:
        draw = Draw(width)
        x = draw.codes(tokens, width, lowest=-3, highest=3)
        w = widest_codes(draw, 33, width)
        scale = torch.full((33, 1), 2.0**-6)
        found = run("weight_only_gemm", x.to(dtype), pack(w, 4), scale, None, None, 4)
        assert torch.equal(found, ((x.long() @ w.long().t()) / 64).to(dtype))

    @pytest.mark.parametrize("scale_dtype", DTYPES[1:])
    @pytest.mark.parametrize("groups", [1, 3])
    @each_width
    @pytest.mark.parametrize("multiplied", [False, True], ids=["float scales", "multipliers"])
    def test_scales_of_16_bits(
        self, scale_dtype: torch.dtype, groups: int, bits: int, multiplied: bool
    ) -> None:
        x, packed, scale, multiplier = weight_only_operands(
            Draw(), 3, 9, 96, bits, groups, multiplied
        )
        assert_weight_only_alike(x, packed, scale.to(scale_dtype), multiplier, None, bits)

    @pytest.mark.parametrize("size", [8, 16, 24, 48, 72, 100])
    @pytest.mark.parametrize("multiplied", [False, True], ids=["float scales", "multipliers"])
    def test_4_bit_groups_that_do_not_fit_the_blocks_are_refused(
        self, size: int, multiplied: bool
    ) -> None:
        assert not operators.packed_tokens("weight_only_gemm", size)
        operands = weight_only_operands(Draw(), 3, 5, 4 * size, 4, 4, multiplied)
        with pytest.raises(NotImplementedError, match=rf"weight_only_gemm: .* groups of {size} "):
            run("weight_only_gemm", *operands, None, 4)


def factors_of(width: int, left: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Signs and both factors of the rotation of that width, in its own split or another."""
    rotation = Hadamard.of(width, seed=1)
    if left is not None:
        rotation = Hadamard(width, left, width // left, 1, seed=1)
    return (rotation.signs(), *rotation.factors())


# Shape without the width, width, order of the left factor if not the rotation's own, group size.
ROTATIONS = [
    *[((3,), 1, None, 1), ((5,), 2, None, 1), ((2, 3), 12, None, 4), ((1,), 92, None, 23)],
    *[((3,), 96, None, 32), ((3,), 576, None, 64), ((), 576, 9 * 4, 1), ((3,), 1536, 12, 128)],
    *[((1,), 1536, None, 96), ((1,), 2048, 1, 32), ((5,), 64, 4, 64)],
    *[((1,), 7168, 28, 256)],
]
each_rotation = pytest.mark.parametrize(("shape", "width", "left", "size"), ROTATIONS, ids=str)


class TestHadamard:
    @pytest.mark.parametrize(
        ("shape", "width"),
        [
            *[((3,), 1), ((5,), 2), ((2, 3), 12), ((1,), 92), ((5,), 96), ((3,), 576)],
            *[((), 576), ((1,), 1536)],
        ],
        ids=str,
    )
    @each_dtype
    def test_reference(self, shape: tuple[int, ...], width: int, dtype: torch.dtype) -> None:
        x, factors = activations(*shape, width, dtype=dtype), factors_of(width)
        exact = reference.hadamard(x.double(), *factors)
        assert_rounded_once(run("hadamard", x, *factors), exact, dtype)

    def test_a_left_factor_of_several_tiles(self) -> None:
        x, factors = activations(1, 5504), factors_of(5504)
        assert len(factors[1]) == 344
        exact = reference.hadamard(x.double(), *factors)
        assert_rounded_once(run("hadamard", x, *factors), exact, torch.float32)

    @pytest.mark.parametrize("width", [12, 576])
    def test_a_left_factor_that_is_neither_symmetric_nor_contiguous(self, width: int) -> None:
        signs, left, right = factors_of(width)
        left = left.roll(1, 0).t()
        assert not torch.equal(left, left.t())
        x = activations(3, width)
        exact = reference.hadamard(x.double(), signs, left, right)
        assert_rounded_once(run("hadamard", x, signs, left, right), exact, torch.float32)


def assert_rotated_and_quantized_alike(
    x: Tensor,
    factors: tuple[Tensor, Tensor, Tensor],
    bits: int,
    size: int | None = None,
    clip: float = 1.0,
    full_range: bool = False,
) -> None:
    """As the reference, but for single steps of codes whose quotient is a tie in float32."""
    form = (bits, size, clip, full_range)
    found = run("hadamard_quantize", x, *factors, *form)
    expected = reference.hadamard_quantize(x, *factors, *form)
    assert found.codes.dtype == torch.int8
    assert found.codes.shape == expected.codes.shape
    assert found.scale.dtype == torch.float32
    assert found.scale.shape == expected.scale.shape
    assert torch.allclose(found.scale, expected.scale, rtol=1e-6, atol=0)
    step = torch.ones(1, dtype=torch.long)
    if size is not None:
        maxima = reference.hadamard(x.float(), *factors).unflatten(-1, (-1, size)).abs().amax(-1)
        largest = reference.largest_group_multiplier(bits)
        multiplier = (maxima * largest / maxima.amax(-1, keepdim=True)).ceil().clamp(1, largest)
        step = multiplier.long().repeat_interleave(size, -1)
    off = (found.codes.long() - expected.codes.long()).abs()
    assert bool(((off == 0) | (off == step)).all())
    assert (off > 0).float().mean() < 1e-3


class TestHadamardQuantize:
    """One kernel where a program holds a token, else a rotation to float32 and a quantizer."""

    @each_rotation
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_one_scale_a_token(
        self, shape: tuple[int, ...], width: int, left: int | None, size: int, dtype: torch.dtype
    ) -> None:
        x = activations(*shape, width, dtype=dtype)
        full_range = dtype == torch.bfloat16  # either dtype takes the same path from the rotation
        assert_rotated_and_quantized_alike(x, factors_of(width, left), 4, None, 1.0, full_range)

    @each_rotation
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_groups(
        self, shape: tuple[int, ...], width: int, left: int | None, size: int, dtype: torch.dtype
    ) -> None:
        x = activations(*shape, width, dtype=dtype)
        assert_rotated_and_quantized_alike(x, factors_of(width, left), 4, size)

    @pytest.mark.parametrize(
        ("width", "left", "size", "dtype"),
        [
            *[(5504, 344, None, torch.float32), (5504, 344, 128, torch.bfloat16)],
            *[(14336, 112, None, torch.float32), (14336, 112, 128, torch.float16)],
            *[(14336, 28, None, torch.bfloat16), (14336, 28, 128, torch.float16)],
        ],
    )
    def test_wide_tokens(self, width: int, left: int, size: int | None, dtype: torch.dtype) -> None:
        x, factors = activations(1, width, dtype=dtype), factors_of(width, left)
        assert_rotated_and_quantized_alike(x, factors, 4, size)

    @each_dtype
    def test_both_forms_are_among_them(self, dtype: torch.dtype) -> None:
        fused = set()
        for _, width, order, size in ROTATIONS:
            _, left, right = factors_of(width, order)
            x = torch.ones(1, width, dtype=dtype)
            fused |= {
                (grouped, rotations.fuses(x, len(left), len(right), size if grouped else None))
                for grouped in (False, True)
            }
        assert len(fused) == 4

    @pytest.mark.parametrize("width", [12, 320])
    @pytest.mark.parametrize("size", [None, 4])
    @each_multiplied_grid
    def test_bits_and_clipping(
        self, width: int, size: int | None, dtype: torch.dtype, bits: int, clip: float
    ) -> None:
        x = activations(3, width, dtype=dtype)
        assert_rotated_and_quantized_alike(x, factors_of(width), bits, size, clip)

    @pytest.mark.parametrize("width", [96, 576])
    @pytest.mark.parametrize("size", [None, 32])
    def test_a_token_of_zeros_gets_zero_codes_and_a_usable_scale(
        self, width: int, size: int | None
    ) -> None:
        x = activations(3, width)
        x[1] = 0
        found = run("hadamard_quantize", x, *factors_of(width), 4, size)
        assert not found.codes[1].any()
        assert bool(((found.scale > 0) & found.scale.isfinite()).all())

    @pytest.mark.parametrize("width", [12, 576])
    @pytest.mark.parametrize("size", [None, 4])
    def test_a_left_factor_that_is_neither_symmetric_nor_contiguous(
        self, width: int, size: int | None
    ) -> None:
        signs, left, right = factors_of(width)
        factors = (signs, left.roll(1, 0).t(), right)
        assert_rotated_and_quantized_alike(activations(3, width), factors, 4, size)


# A shape within one tile, and one of several tiles in each direction, all of them ragged.
TILED = pytest.mark.parametrize(("tokens", "rows", "width"), [(17, 33, 70), (260, 133, 150)])
FEW_TILED = pytest.mark.parametrize(("tokens", "rows", "width"), [(1, 33, 70), (16, 133, 301)])
# Groups that no step of a tile crosses.
GROUPS = pytest.mark.parametrize(("size", "groups"), [(256, 2), (512, 1)])


class TestTiles:
    @staticmethod
    def assert_integers_alike(tokens: int, rows: int, width: int) -> None:
        draw = Draw()
        a, w = draw.codes(tokens, width), draw.codes(rows, width)
        ones = torch.ones(1, 1), torch.ones(rows)
        found = run("int8_gemm", a, ones[0], w, ones[1], None, torch.float32)
        assert torch.equal(found, (a.long() @ w.long().t()).float())
        w = widest_codes(draw, rows, width)
        found = run("int4_gemm", a, ones[0], pack(w, 4), ones[1], None, None, torch.float32)
        assert torch.equal(found, (a.long() @ w.long().t()).float())

    @pytest.mark.parametrize("name", integer.PREFILL_TILES)
    @TILED
    def test_integers_of_many_tokens(
        self, name: str, tokens: int, rows: int, width: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tile = integer.PREFILL_TILES[name]
        take_only(monkeypatch, integer, "_prefill_kernel", "_integer_kernel", tile)
        self.assert_integers_alike(tokens, rows, width)

    @pytest.mark.parametrize("name", integer.DECODE_TILES)
    @pytest.mark.parametrize(
        ("tokens", "rows", "width"), [(1, 33, 70), (16, 133, 301), (3, 33, 1101)]
    )
    def test_integers_of_few_tokens(
        self, name: str, tokens: int, rows: int, width: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tile = integer.DECODE_TILES[name]
        take_only(monkeypatch, integer, "_decode_kernel", "_integer_kernel", tile)
        self.assert_integers_alike(tokens, rows, width)

    @pytest.mark.parametrize("name", integer.PREFILL_TILES)
    @GROUPS
    def test_multipliers_of_many_tokens(
        self, name: str, size: int, groups: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tile = integer.PREFILL_TILES[name]
        take_only(monkeypatch, integer, "_prefill_kernel", "_integer_kernel", tile)
        operands = multiplied_operands(Draw(), 33, 70, size * groups, groups)
        assert_multiplied_alike("int4_gemm", *operands, None, torch.float32)

    @pytest.mark.parametrize("name", integer.DECODE_TILES)
    @GROUPS
    def test_multipliers_of_few_tokens(
        self, name: str, size: int, groups: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tile = integer.DECODE_TILES[name]
        take_only(monkeypatch, integer, "_decode_kernel", "_integer_kernel", tile)
        operands = multiplied_operands(Draw(), 3, 70, size * groups, groups)
        assert_multiplied_alike("int4_gemm", *operands, None, torch.float32)

    @pytest.mark.parametrize("name", grouped.TILES)
    @pytest.mark.parametrize("form", ["blocks, ordered", "weight groups"])
    @pytest.mark.parametrize(
        ("length", "rows", "size", "groups"), [(3, 33, 12, 3), (133, 133, 96, 2)]
    )
    def test_groups(
        self,
        name: str,
        form: str,
        length: int,
        rows: int,
        size: int,
        groups: int,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        take_only(monkeypatch, grouped, "_kernel", "_group_kernel", grouped.TILES[name])
        operands = group_operands(Draw(), 1, length, rows, size, groups, form)
        assert_multiplied_alike("group_gemm", *operands, None, size, torch.float32)

    @pytest.mark.parametrize("name", weight_only.PREFILL_TILES)
    @TILED
    @each_width
    def test_floats_of_many_tokens(
        self,
        name: str,
        tokens: int,
        rows: int,
        width: int,
        bits: int,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        tile = weight_only.PREFILL_TILES[name]
        take_only(monkeypatch, weight_only, "_prefill_kernel", "_weight_only_kernel", tile)
        operands = weight_only_operands(Draw(), tokens, rows, width, bits, 1, multiplied=False)
        assert_weight_only_alike(*operands, None, bits)

    @pytest.mark.parametrize("name", weight_only.DECODE_TILES)
    @FEW_TILED
    @each_width
    def test_floats_of_few_tokens(
        self,
        name: str,
        tokens: int,
        rows: int,
        width: int,
        bits: int,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        tile = weight_only.DECODE_TILES[name]
        take_only(monkeypatch, weight_only, "_decode_kernel", "_weight_only_kernel", tile)
        operands = weight_only_operands(Draw(), tokens, rows, width, bits, 1, multiplied=False)
        assert_weight_only_alike(*operands, None, bits)

    @pytest.mark.parametrize(
        ("launcher", "name"),
        [
            *[("_prefill_kernel", name) for name in weight_only.PREFILL_TILES],
            *[("_decode_kernel", name) for name in weight_only.DECODE_TILES],
        ],
    )
    @pytest.mark.parametrize(("bits", "multiplied"), [(4, True), (8, False)])
    def test_floats_in_groups(
        self,
        launcher: str,
        name: str,
        bits: int,
        multiplied: bool,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        tiles = {**weight_only.PREFILL_TILES, **weight_only.DECODE_TILES}
        take_only(monkeypatch, weight_only, launcher, "_weight_only_kernel", tiles[name])
        tokens = 3 if launcher == "_decode_kernel" else 33
        operands = weight_only_operands(Draw(), tokens, 70, 512, bits, 2, multiplied)
        assert_weight_only_alike(*operands, None, bits)

    @pytest.mark.parametrize(("band", "tokens", "rows"), [(1, 33, 70), (2, 100, 40), (3, 112, 33)])
    def test_bands_reach_every_tile(
        self, band: int, tokens: int, rows: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tile = launch.tile(32, 16, 4, 3, band=band, BLOCK_K=64)
        take_only(monkeypatch, integer, "_prefill_kernel", "_integer_kernel", tile)
        self.assert_integers_alike(tokens, rows, 33)

    def test_packed_sums_beyond_float32_are_rounded_once(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tile = launch.tile(32, 16, 4, 2, BLOCK_K=512)  # few steps of a width above 2²⁴ / (128 · 8)
        take_only(monkeypatch, integer, "_prefill_kernel", "_integer_kernel", tile)
        a = torch.full((17, 16_501), -128, dtype=torch.int8)
        w = torch.full((5, 16_501), -8, dtype=torch.int8)
        w[1, -1] = 1
        scales = torch.ones(1, 1), torch.ones(5)
        found = run("int4_gemm", a, scales[0], pack(w, 4), scales[1], None, None, torch.float32)
        assert torch.equal(found, (a.long() @ w.long().t()).float())


class TestTilesThatFit:
    """A step of K stays within a group, or is one block of which each half does."""

    @pytest.mark.parametrize("size", [32, 64, 96, 128, 160, 256, 384, 512, 1024, 1120])
    @pytest.mark.parametrize("tiles", ["PREFILL_TILES", "DECODE_TILES"])
    @each_dtype
    def test_packed_groups(self, size: int, tiles: str, dtype: torch.dtype) -> None:
        out, multiplier = torch.empty(1, dtype=dtype), torch.ones(1)
        named = {"out": out, "multiplier": multiplier, "OPERAND": launch.FLOATS[dtype]}
        settings = {"GROUPED": True, "PACKED": True, "GROUP": size}
        for module in (integer, weight_only):
            tile_list = list(getattr(module, tiles).values())
            left = module.tiles_that_fit(tile_list, named, **settings)
            steps = [tile.kwargs["BLOCK_K"] for tile in left]
            assert 64 in steps
            assert all(step == 64 or size % step == 0 for step in steps)


def _operator_calls() -> dict[str, tuple[str, tuple[Any, ...]]]:
    """Every operator in each of its forms, by a name and small operands."""
    draw = Draw()
    x, batch = activations(3, 96), activations(2, 3, 96)
    codes, scale = draw.codes(3, 96), draw.scales(3, 1)
    weight, row_scale, bias = draw.codes(7, 96), draw.scales(7), draw.floats(7)
    packed = pack(draw.codes(7, 96, lowest=-8, highest=7), 4)
    multiplier = draw.codes(96, lowest=1, highest=15)
    of_sequence = draw.codes(2, 1, 96, lowest=1, highest=15)
    mask = torch.tensor([[True, False, True], [False, True, True]])
    in_groups = group_operands(draw, 2, 3, 7, 32, 3, "weight groups and blocks")
    ordered = group_operands(draw, 2, 3, 7, 32, 3, "blocks, ordered")
    floats = weight_only_operands(draw, 3, 7, 96, 4, 3, multiplied=False)
    multiplied = weight_only_operands(draw, 3, 7, 96, 4, 3, multiplied=True)
    single = torch.float32
    query, kept = draw.floats(2, 4, 3, 24), draw.floats(2, 2, 1, 24)
    keys, values = (reference.quantize_heads(draw.floats(2, 2, 5, 24), 4, None) for _ in range(2))
    seen, first = draw.floats(2, 1, 3, 5) > -1, (kept, kept + 1, torch.tensor([1, -1]))
    query_codes, query_scale, *_ = reference.quantize_per_token(query, 8)
    fp8, bytes_ = reference.fp8_quantize(x, "token"), fp_weight(draw, 7, 96, "MXFP8")[0] & 0xF7
    return {
        "quantize_heads": ("quantize_heads", (batch, 4, 32)),
        "fp_quantize": ("fp_quantize", (x, "e2m1", "e4m3", 16, torch.tensor([0.01]))),
        "fp8_quantize": ("fp8_quantize", (x, "token")),
        "mx_quantize": ("mx_quantize", (x, "e2m1")),
        "fp8_gemm": ("fp8_gemm", (*fp8[:2], bytes_, row_scale[:, None], bias, single)),
        "fp_gemm": ("fp_gemm", (x, *fp_weight(draw, 7, 96, "NVFP4")[:3], bias, "e2m1")),
        "fp_gemm, bytes": ("fp_gemm", (x, *fp_weight(draw, 7, 96, "MXFP8")[:3], bias, "e4m3")),
        "weight_only_gemm, words": (
            "weight_only_gemm",
            (x, *word_weight(draw, 7, 96, 3, 3), draw.multipliers(7, 3), bias, 3),
        ),
        "cached_attention": (
            "cached_attention",
            (query, keys, values, *first, seen, 0.2, 4, None),
        ),
        "int8_attention": (
            "int8_attention",
            (query_codes, query_scale, keys, values, seen, 0.2, 4, single),
        ),
        "quantize_per_token": ("quantize_per_token", (x, 4)),
        "quantize_per_tensor": ("quantize_per_tensor", (x, 4)),
        "static_quantize": ("static_quantize", (x, torch.tensor(0.1), 4)),
        "quantize_token_groups": ("quantize_token_groups", (x, 4, 8)),
        "quantize_smoothed": ("quantize_smoothed", (x, multiplier, 4)),
        "quantize_smoothed, batch": ("quantize_smoothed", (batch, of_sequence, 4)),
        "channel_multipliers": ("channel_multipliers", (x.abs(), 4)),
        "runtime_smooth_quantize": ("runtime_smooth_quantize", (batch, 4, 8, 1.0, mask)),
        "runtime_smooth_quantize, 1": ("runtime_smooth_quantize", (batch, 4, 1, 1.0, mask)),
        "int8_gemm": ("int8_gemm", (codes, scale, weight, row_scale, bias, single)),
        "int4_gemm": ("int4_gemm", (codes, scale, packed, row_scale, None, bias, single)),
        "int4_gemm, multipliers": (
            "int4_gemm",
            (codes, scale, packed, row_scale, draw.multipliers(7, 3), bias, single),
        ),
        "expert_gemm": (
            "expert_gemm",
            (codes, scale, torch.tensor([2, 3]), [weight] * 2, [row_scale] * 2, [], [], single),
        ),
        "expert_weight_only_gemm": (
            "expert_weight_only_gemm",
            (x, torch.tensor([2, 3]), [weight] * 2, [row_scale[:, None]] * 2, [], [bias] * 2, 8),
        ),
        "group_gemm": ("group_gemm", (*in_groups, bias, 32, single)),
        "group_gemm, ordered": ("group_gemm", (*ordered, bias, 32, single)),
        "weight_only_gemm": ("weight_only_gemm", (*floats, bias, 4)),
        "weight_only_gemm, multipliers": ("weight_only_gemm", (*multiplied, bias, 4)),
        "hadamard": ("hadamard", (x, *factors_of(96))),
        "hadamard_quantize": ("hadamard_quantize", (activations(3, 320), *factors_of(320), 4)),
        "hadamard_quantize, two kernels": ("hadamard_quantize", (x, *factors_of(96), 4, 8)),
    }


OPERATORS = _operator_calls()
QUANTIZERS = [  # and the rotation alone
    call for call in OPERATORS if "gemm" not in call and "int8" not in call
]
each_operator = pytest.mark.parametrize("call", OPERATORS)
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "every other": lambda t: torch.stack([t, torch.full_like(t, 1)], -1)[..., 0],
    "turned": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
}
LAID_OUT = [
    pytest.param(call, position, layout, id=f"{call} {position} {layout}")
    for call, (_, operands) in OPERATORS.items()
    for position, operand in enumerate(operands)
    if isinstance(operand, Tensor)
    for layout in list(LAYOUTS)[: operand.dim()]
]


@cache
def result_of(call: str) -> Any:
    """What an operator gives for its operands as they are."""
    name, operands = OPERATORS[call]
    return getattr(operators, name)(*map(on_device, operands))


class TestLayouts:
    @pytest.mark.parametrize(("call", "position", "layout"), LAID_OUT)
    def test_operands_need_not_be_contiguous(self, call: str, position: int, layout: str) -> None:
        name, operands = OPERATORS[call]
        placed = [on_device(operand) for operand in operands]
        placed[position] = LAYOUTS[layout](placed[position])
        found, expected = getattr(operators, name)(*placed), result_of(call)
        if isinstance(expected, Tensor):
            assert torch.equal(found, expected)
        else:
            assert_same(found, expected)

    @each_operator
    def test_operands_are_not_written_to(self, call: str) -> None:
        name, operands = OPERATORS[call]
        placed = [on_device(operand) for operand in operands]
        copies = [o.clone() if isinstance(o, Tensor) else o for o in placed]
        getattr(operators, name)(*placed)
        for operand, copy in zip(placed, copies, strict=True):
            if isinstance(operand, Tensor):
                assert torch.equal(operand, copy)

    def test_every_operator_is_among_them(self) -> None:
        defined = {name for name in vars(operators) if name[0] != "_" and hasattr(reference, name)}
        # Triton's interpreter has no dot_scaled: test_mx.py lends it one.
        assert {name for name, _ in OPERATORS.values()} == defined - {"mx_gemm"}


class TestNoTokens:
    @pytest.mark.parametrize("shape", [(0, 96), (2, 0, 96), (0, 3, 96)], ids=str)
    @pytest.mark.parametrize(
        ("name", "operands"),
        [
            ("quantize_per_token", (4,)),
            ("quantize_token_groups", (4, 8)),
            ("quantize_smoothed", (torch.ones(96, dtype=torch.int8), 4)),
            ("static_quantize", (torch.tensor(0.1), 4)),
            ("hadamard_quantize", (*factors_of(96), 4)),
            ("hadamard_quantize", (*factors_of(96), 4, 8)),
        ],
    )
    def test_quantizers(self, shape: tuple[int, ...], name: str, operands: tuple[Any, ...]) -> None:
        found = run(name, torch.ones(shape), *operands)
        one_scale = name == "static_quantize"
        assert found.codes.shape == shape
        assert found.codes.dtype == torch.int8
        assert found.scale.shape == ((1,) * len(shape) if one_scale else (*shape[:-1], 1))
        assert found.scale.dtype == torch.float32

    def test_a_fused_rotation(self) -> None:
        found = run("hadamard_quantize", torch.ones(0, 576), *factors_of(576), 4)
        assert found.codes.shape == (0, 576)
        assert found.scale.shape == (0, 1)

    @pytest.mark.parametrize(("batch", "length"), [(0, 3), (2, 0)])
    @pytest.mark.parametrize("size", [1, 8])
    def test_runtime_smoothing(self, batch: int, length: int, size: int) -> None:
        found = run("runtime_smooth_quantize", torch.ones(batch, length, 96), 4, size)
        assert found.codes.shape == (batch, length, 96)
        assert found.scale.shape == (batch, length, 1)
        if size > 1:
            assert found.block_scale is not None
            assert found.order is not None
            assert found.block_scale.shape == (batch, 12)
            assert found.order.shape == (batch, 96)

    def test_channel_multipliers(self) -> None:
        assert run("channel_multipliers", torch.ones(0, 96), 4).shape == (0, 96)

    @pytest.mark.parametrize("shape", [(0, 96), (2, 0, 96)], ids=str)
    @each_dtype
    def test_hadamard(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        found = run("hadamard", torch.ones(shape, dtype=dtype), *factors_of(96))
        assert found.shape == shape
        assert found.dtype == dtype

    @each_dtype
    def test_products(self, dtype: torch.dtype) -> None:
        draw = Draw()
        codes, scale, bias = draw.codes(0, 96), draw.scales(0, 1), draw.floats(7)
        weight, weight_scale = draw.codes(7, 96), draw.scales(7)
        packed, multiplier = pack(widest_codes(draw, 7, 96), 4), draw.multipliers(7, 3)
        in_groups = group_operands(draw, 2, 0, 7, 32, 3, "blocks, ordered")
        none = group_operands(draw, 0, 3, 7, 32, 3, "weight groups")[:2]
        x = torch.ones(0, 96, dtype=dtype)
        for found, shape in (
            (run("int8_gemm", codes, scale, weight, weight_scale, bias, dtype), (0, 7)),
            (run("int4_gemm", codes, scale, packed, weight_scale, None, bias, dtype), (0, 7)),
            (run("int4_gemm", codes, scale, packed, weight_scale, multiplier, None, dtype), (0, 7)),
            (run("group_gemm", *in_groups, bias, 32, dtype), (2, 0, 7)),
            (
                run(
                    "group_gemm", *none, None, None, weight, weight_scale[:, None], bias, 32, dtype
                ),
                (0, 3, 7),
            ),
            (run("weight_only_gemm", x, packed, weight_scale[:, None], None, bias, 4), (0, 7)),
        ):
            assert found.shape == shape
            assert found.dtype == dtype


class TestRefusals:
    @pytest.mark.parametrize("call", [call for call in QUANTIZERS if call != "channel_multipliers"])
    def test_float64_is_refused_by_name(self, call: str) -> None:
        name, (x, *operands) = OPERATORS[call]
        with pytest.raises(TypeError, match=rf"^{name}: .*not torch\.float64"):
            run(name, x.double(), *operands)

    def test_float64_tokens_of_a_product_are_refused_by_name(self) -> None:
        _, (x, *operands) = OPERATORS["weight_only_gemm"]
        with pytest.raises(TypeError, match=r"^weight_only_gemm: .*not torch\.float64"):
            run("weight_only_gemm", x.double(), *operands)

    @pytest.mark.parametrize("dtype", [torch.int8, torch.int32])
    def test_integers_are_refused(self, dtype: torch.dtype) -> None:
        with pytest.raises(TypeError, match=rf"quantize_per_token: .*not {dtype}"):
            run("quantize_per_token", torch.ones(3, 24, dtype=dtype), 4)


def _registered() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """What kernels/triton registers with PyTorch, and operands for it."""
    x, batch = activations(3, 24), activations(2, 3, 24)
    multiplier = Draw().codes(24, lowest=1, highest=15)
    order = Draw().orders(2, 24)
    return {
        "quantize_per_token": (quantize._per_token, (x, 4, 1.0, True)),
        "quantize_token_groups": (quantize._token_groups, (x, 4, 8, 1.0)),
        "quantize_smoothed": (quantize._smoothed, (x, multiplier, 4, 1.0)),
        "quantize_one_scale": (quantize._one_scale, (x, torch.tensor(2.0), True, 4, 1.0)),
        "quantize_one_scale, bfloat16": (
            quantize._one_scale,
            (batch.bfloat16(), torch.tensor(2.0), False, 8, 1.0),
        ),
        "channel_multipliers": (quantize.channel_multipliers, (x.abs(), 4)),
        "live_channel_maxima": (runtime_smooth._channel_maxima, (batch, None, False)),
        "live_channel_maxima, masked": (
            runtime_smooth._channel_maxima,
            (batch, torch.ones(2, 3, dtype=torch.bool), True),
        ),
        "quantize_ordered": (
            runtime_smooth._ordered,
            (batch, order, torch.ones(2, 3), 4, 8, 1.0),
        ),
        "quantize_heads": (attention.quantize_heads, (batch, 8, 12)),
        "fp_quantize": (fp_quantizers._fp_quantize, (x, "e4m3", "e8m0", 32, None)),
        "hadamard": (rotations._hadamard, (x, *factors_of(24), torch.bfloat16)),
        "hadamard_quantize": (
            rotations._fused,
            (activations(3, 320), *factors_of(320)[:2], 16, 4, 0, 1.0, True),
        ),
        "hadamard_quantize, groups": (
            rotations._fused,
            (activations(3, 320), *factors_of(320)[:2], 16, 4, 32, 1.0, False),
        ),
    }


REGISTERED = _registered()


class TestSizes:
    @pytest.mark.parametrize("number", [1, 2, 3, 16, 17, 64, 127, 8192, 14336])
    def test_they_are_tritons(self, number: int) -> None:
        assert launch.next_power_of_2(number) == triton.next_power_of_2(number)
        for size in (1, 16, 128):
            assert launch.cdiv(number, size) == triton.cdiv(number, size)


class TestSizeClasses:
    def test_decode_steps_by_doublings_prompts_by_fours(self) -> None:
        classes = {n: tuning.token_bucket(n) for n in (0, 1, 3, 9, 16, 17, 128, 129, 8192, 99_999)}
        expected = {0: 1, 1: 1, 3: 4, 9: 16, 16: 16, 17: 128, 128: 128, 129: 512}
        assert classes == expected | {8192: 8192, 99_999: 8192}


class _Recorded:
    """A stand-in for a kernel: what it was launched with."""

    arg_names = ("x", "BLOCK_M")

    def __init__(self) -> None:
        self.blocks: list[int] = []

    def run(self, x: Tensor, grid: tuple[int, ...], BLOCK_M: int, **options: Any) -> None:
        assert grid == (BLOCK_M + 1,)
        self.blocks.append(BLOCK_M)


class TestTuned:
    def test_a_tile_is_timed_once_a_device_and_form(self, monkeypatch: pytest.MonkeyPatch) -> None:
        timed: list[tuple[Any, ...]] = []

        class Tuner:
            """Finds the second tile faster for two tokens, the first for others."""

            def __init__(self, configs: list[triton.Config]) -> None:
                self.configs = configs

            def run(self, x: Tensor, **options: Any) -> None:
                timed.append((x.dtype, len(x)))
                self.best_config = self.configs[len(x) == 2]

        monkeypatch.setattr(launch, "INTERPRETED", False)
        monkeypatch.setattr(
            triton, "autotune", lambda configs, *rest, **options: lambda kernel: Tuner(configs)
        )
        tiles = {"first": launch.tile(32, 16, 4, 3), "second": launch.tile(32, 64, 4, 3)}
        kernel = _Recorded()
        tuned = launch.Tuned(kernel, tiles, ["tokens"])
        two, three = torch.ones(2), torch.ones(3)
        for device, x in ((0, two), (0, three), (0, two), (1, three), (0, two.half()), (0, three)):
            form = (device, len(x), x.dtype)
            tuned.launch(form, lambda meta: (meta["BLOCK_M"] + 1,), x)
        assert kernel.blocks == [64, 16, 64, 16, 64, 16]
        asked = [(torch.float32, 2), (torch.float32, 3), (torch.float32, 3), (torch.float16, 2)]
        assert timed == asked

    def test_a_form_tells_all_that_a_tile_depends_on(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """What tiles are timed by, and which of them fit, are functions of the form."""
        known: dict[Any, Any] = {}

        def check(self: launch.Tuned, form: Any, grid: Any, *args: Any, **named: Any) -> None:
            by_name = {**dict(zip(self._parameters, args, strict=False)), **named}
            key = [by_name[name] for name in self._key]
            key += [str(value.dtype) for value in by_name.values() if isinstance(value, Tensor)]
            tiles = {**module.PREFILL_TILES, **module.DECODE_TILES} if split else module.TILES
            configs = list(tiles.values())
            if self._prune is not None:
                positional = dict(zip(self._parameters, args, strict=False))
                configs = self._prune["early_config_prune"](configs, positional, **named)
            found = (
                key,
                [str(config) for config in configs],
                [
                    [value({**by_name, **config.kwargs}) for config in configs]
                    for value in self._heuristics.values()
                ],
            )
            assert known.setdefault((id(self), form), found) == found

        monkeypatch.setattr(launch.Tuned, "launch", check)
        draw = Draw()
        for tokens in (1, 2, 17, 33):
            for width in (64, 192, 320):
                for dtype in DTYPES:
                    for groups in (1, 2):
                        split, module = True, integer
                        x = draw.codes(tokens, width), draw.scales(tokens, 1)
                        bias = draw.floats(7).to(dtype) if groups == 2 else None
                        weight = draw.codes(7, width), draw.scales(7)
                        run("int8_gemm", *x, *weight, bias, torch.float32)
                        run("int8_gemm", *x, *weight, bias, dtype)
                        packed = pack(widest_codes(draw, 7, width), 4)
                        for multiplier in (None, draw.multipliers(7, groups)):
                            run("int4_gemm", *x, packed, weight[1], multiplier, bias, dtype)
                        module = weight_only
                        rows = draw.floats(tokens, width).to(dtype)
                        for scale in (draw.scales(7, groups), draw.scales(7, groups).bfloat16()):
                            run("weight_only_gemm", rows, packed, scale, None, bias, 4)
                            run("weight_only_gemm", rows, weight[0], scale, None, bias, 8)
                        split, module = False, grouped
                        operands = group_operands(
                            draw, 1, tokens, 7, width // groups, groups, "weight groups"
                        )
                        run("group_gemm", *operands, bias, width // groups, dtype)
        assert len({kernel for kernel, _ in known}) == 5


class TestAsPyTorchOperators:
    @pytest.mark.parametrize("name", REGISTERED)
    def test_it_is_called_past_pytorch_unless_traced_or_differentiated(
        self, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        launcher, operands = REGISTERED[name]
        x, *others = (on_device(operand) for operand in operands)
        dispatched = []
        real = launcher.registered

        def count(*arguments: Any) -> Any:
            dispatched.append(launcher)
            return real(*arguments)

        monkeypatch.setattr(launcher, "registered", count)
        expected = launcher(x, *others)
        assert not dispatched
        found = launcher(x.clone().requires_grad_(), *others)
        assert len(dispatched) == 1
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)
        with torch.no_grad():
            launcher(x.clone().requires_grad_(), *others)
        assert len(dispatched) == 1
        with FakeTensorMode() as mode:
            launcher(*(mode.from_tensor(o) if isinstance(o, Tensor) else o for o in (x, *others)))
        assert len(dispatched) == 2

    def test_a_gradient_is_refused(self) -> None:
        x = on_device(torch.ones(2, 24)).requires_grad_()
        _, scale, *_ = operators.quantize_per_token(x, 4)
        with pytest.raises(RuntimeError, match="no autograd formula"):
            scale.sum().backward()

    @pytest.mark.parametrize("name", REGISTERED)
    def test_opcheck(self, name: str) -> None:
        torch.compiler.reset()
        launcher, operands = REGISTERED[name]
        operator = launcher.registered
        assert operator._qualname == f"smoothq::triton_{name.partition(',')[0]}"
        torch.library.opcheck(operator, tuple(on_device(operand) for operand in operands))

    @pytest.mark.parametrize(
        "call",
        ["quantize_per_tensor", "runtime_smooth_quantize", "hadamard_quantize, two kernels"],
    )
    def test_it_is_part_of_a_whole_graph(self, call: str) -> None:
        name, operands = OPERATORS[call]
        torch.compiler.reset()
        tensors = [on_device(o) for o in operands if isinstance(o, Tensor)]
        constants = [o for o in operands if not isinstance(o, Tensor)]

        def layer(*tensors: Tensor) -> Any:
            arguments = iter(tensors)
            others = iter(constants)
            return getattr(operators, name)(
                *(next(arguments) if isinstance(o, Tensor) else next(others) for o in operands)
            )

        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        found, expected = compiled(*tensors), layer(*tensors)
        for one, other in zip(tuple(found), tuple(expected), strict=True):
            assert (one is None and other is None) or torch.equal(one, other)
