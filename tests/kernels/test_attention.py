"""Rows of a cache, and attention over them: the definition, the CPU's and Triton's operators.

Rows must agree to the last byte. Attention is held to the definition in float64, on operands whose
sizes fit no tile: in float32 to a few roundings, in 16 bits to those of the products' operands.
"""

import importlib
import struct
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from smoothq import kernels
from smoothq.kernels import reference
from tests.kernels.test_quantizers import activations

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}

FORMATS = [(8, None), (8, 4), (8, 20), (4, None), (4, 4), (4, 20)]
each_format = pytest.mark.parametrize(("bits", "group_size"), FORMATS)
each_dtype = pytest.mark.parametrize("dtype", TOLERANCE)
# Queries, tokens: one token that is decoded, some of a prompt, more of either than a tile.
each_length = pytest.mark.parametrize(
    ("length", "tokens"), [(1, 1), (1, 75), (3, 7), (23, 37)], ids=str
)


@pytest.fixture(params=["cpu", "triton"])
def run(request: pytest.FixtureRequest) -> Callable[..., Tensor]:
    """An operator of a backend by name, its operands and result on the CPU."""
    if request.param == "triton":
        pytest.importorskip("triton")
        device = DEVICE
    else:
        device = "cpu"
    backend = importlib.import_module(f"smoothq.kernels.{request.param}")

    def call(name: str, *operands: Any) -> Tensor:
        placed = [o.to(device) if isinstance(o, Tensor) else o for o in operands]
        return getattr(backend, name)(*placed).cpu()

    return call


def heads(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Keys or values with a few large channels, not around zero."""
    return (activations(*shape, seed=seed) + 0.3).to(dtype)


def attention_mask(batch: int, length: int, tokens: int) -> Tensor:
    """Causal at the end of the tokens, the second sequence padded, its first query blind."""
    mask = torch.ones(length, tokens, dtype=torch.bool).tril(tokens - length)
    mask = mask.expand(batch, 1, length, tokens).clone()
    mask[1:, :, :, : tokens // 3] = False
    mask[1:, :, 0] = False
    return mask


def assert_close(found: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == dtype
    assert found.shape == exact.shape
    error = (found.double() - exact).abs().max()
    assert error <= TOLERANCE[dtype] * exact.abs().max()


class TestRows:
    @each_format
    def test_codes_scales_and_offsets_by_the_description(self, bits, group_size) -> None:
        x, size = heads(2, 40), group_size or 40
        levels = 2**bits - 1
        for row, stored in zip(
            x.double(), reference.quantize_heads(x, bits, group_size), strict=True
        ):
            data, groups = bytes(stored.tolist()), 40 // size
            assert len(data) == reference.row_bytes(40, bits, group_size)
            floats = struct.unpack(f"<{2 * groups}e", data[40 * bits // 8 :])
            for g in range(groups):
                scale, offset = floats[g], floats[groups + g]
                numbers = row[g * size : (g + 1) * size]
                spread = (numbers.max() - numbers.min()).item()
                assert scale == pytest.approx(spread / levels, rel=1e-3)
                codes = _codes(data[g * size * bits // 8 :], bits, size)
                found = torch.tensor(codes, dtype=torch.float64) * scale + offset
                rounding = 2**-10 * (abs(offset) + spread)  # of the scale and the offset
                assert (found - numbers).abs().max() <= scale / 2 + rounding

    @each_format
    def test_every_code_comes_back(self, bits, group_size) -> None:
        x = heads(3, 2, 5, 40)
        rows = reference.quantize_heads(x, bits, group_size)
        values = reference.dequantize_heads(rows, bits, group_size, torch.float64)
        assert reference.row_width(rows.shape[-1], bits, group_size) == 40
        codes, scale, offset = reference.row_parts(rows, bits, group_size)
        assert int(codes.min()) == -(2 ** (bits - 1))
        assert torch.equal(values, (codes.double() * scale + offset).flatten(-2))
        again = reference.quantize_heads(values.float(), bits, group_size)
        once_more = reference.dequantize_heads(again, bits, group_size, torch.float64)
        assert (once_more - values).abs().max() <= 2e-3 * values.abs().max()

    @each_format
    @each_dtype
    @pytest.mark.parametrize("shape", [(40,), (2, 3, 7, 40), (1, 0, 3, 40)], ids=str)
    def test_every_backend_gives_the_same_bytes(self, run, shape, dtype, bits, group_size) -> None:
        x = heads(*shape, dtype=dtype)
        if x.numel() > 40:
            x.flatten(0, -2)[:2] = torch.tensor([0.0, 2.5]).to(dtype)[:, None]  # without a spread
        found = run("quantize_heads", x, bits, group_size)
        assert torch.equal(found, reference.quantize_heads(x, bits, group_size))

    def test_equal_numbers_are_kept(self) -> None:
        x = torch.full((1, 8), 2.5)
        for bits in (8, 4):
            rows = reference.quantize_heads(x, bits, None)
            assert torch.equal(reference.dequantize_heads(rows, bits, None, torch.float32), x)


def _codes(data: bytes, bits: int, size: int) -> list[int]:
    """A group's codes from its bytes."""
    if bits == 8:
        return list(struct.unpack(f"<{size}b", data[:size]))
    low = [byte % 16 for byte in data[: size // 2]]
    high = [byte // 16 for byte in data[: size // 2]]
    return [code - 16 * (code > 7) for code in low + high]


class TestCachedAttention:
    @each_length
    @each_format
    @pytest.mark.parametrize("first_tokens", [0, 2])
    def test_float32(self, run, bits, group_size, length, tokens, first_tokens) -> None:
        operands = _cached(bits, group_size, length, tokens, first_tokens)
        query, *others = operands
        exact = reference.cached_attention(query.double(), *others)
        assert_close(run("cached_attention", *operands), exact, torch.float32)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize(("bits", "group_size"), [(8, None), (4, 20)])
    def test_16_bits(self, run, dtype, bits, group_size) -> None:
        query, *others = _cached(bits, group_size, 5, 37, 2)
        query = query.to(dtype)
        exact = reference.cached_attention(query.double(), *others)
        assert_close(run("cached_attention", query, *others), exact, dtype)

    def test_every_token_is_seen_without_a_mask(self, run) -> None:
        query, keys, values, *_ = _cached(8, None, 3, 7, 0)
        settings = (None, None, None, None, 0.2, 8, None)
        exact = reference.cached_attention(query.double(), keys, values, *settings)
        assert_close(run("cached_attention", query, keys, values, *settings), exact, torch.float32)
        seen = torch.ones(1, 1, 3, 7, dtype=torch.bool)
        masked = run("cached_attention", query, keys, values, None, None, None, seen, 0.2, 8, None)
        assert_close(masked, exact, torch.float32)

    def test_a_query_that_sees_nothing_gives_zeros(self, run) -> None:
        operands = _cached(4, None, 3, 7, 0)
        assert not run("cached_attention", *operands)[1, :, 0].any()

    def test_rows_may_be_a_window_of_a_longer_cache(self, run) -> None:
        query, keys, values, *others = _cached(4, 4, 3, 9, 0)
        longer = [torch.cat([x[:, :, :2], x, x[:, :, :3]], 2) for x in (keys, values)]
        windows = [x[:, :, 2:-3] for x in longer]
        found = run("cached_attention", query, *windows, *others)
        assert torch.equal(found, run("cached_attention", query, keys, values, *others))

    def test_many_tokens_for_few_queries_are_split(self, run) -> None:
        operands = _cached(8, None, 1, 700, 2)
        query, *others = operands
        exact = reference.cached_attention(query.double(), *others)
        assert_close(run("cached_attention", *operands), exact, torch.float32)


def _cached(
    bits: int, group_size: int | None, length: int, tokens: int, first_tokens: int
) -> tuple[Any, ...]:
    """Operands of cached_attention: 2 sequences, 6 query heads, 2 key/value heads of 40."""
    query = heads(2, 6, length, 40, seed=1) / 4
    keys, values = (
        reference.quantize_heads(heads(2, 2, tokens, 40, seed=seed), bits, group_size)
        for seed in (2, 3)
    )
    first: tuple[Tensor | None, ...] = (None, None, None)
    if first_tokens:
        kept = (heads(2, 2, first_tokens, 40, seed=seed) for seed in (4, 5))
        first = (*kept, torch.tensor([-1, tokens // 3]))
    mask = attention_mask(2, length, tokens)
    return query, keys, values, *first, mask, 0.3, bits, group_size


class TestInt8Attention:
    @each_length
    @pytest.mark.parametrize(("bits", "packed"), [(8, True), (8, False), (4, True)])
    def test_float32(self, run, bits, packed, length, tokens) -> None:
        *operands, dtype = _integer(bits, packed, length, tokens, torch.float32)
        exact = reference.int8_attention(*operands, torch.float64)
        assert_close(run("int8_attention", *operands, dtype), exact, dtype)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_16_bits(self, run, dtype) -> None:
        *operands, _ = _integer(8, False, 5, 37, dtype)
        exact = reference.int8_attention(*operands, torch.float64)
        assert_close(run("int8_attention", *operands, dtype), exact, dtype)

    def test_many_tokens_for_few_queries_are_split(self, run) -> None:
        *operands, dtype = _integer(8, True, 1, 700, torch.float32)
        exact = reference.int8_attention(*operands, torch.float64)
        assert_close(run("int8_attention", *operands, dtype), exact, dtype)

    def test_it_is_attention_with_the_queries_rounded(self) -> None:
        codes, scale, keys, values, mask, scaling, bits, _ = _integer(8, True, 5, 37, torch.float32)
        rounded = codes.double() * scale
        no_first = (None, None, None)
        expected = reference.cached_attention(
            rounded, keys, values, *no_first, mask, scaling, bits, None
        )
        found = reference.int8_attention(
            codes, scale, keys, values, mask, scaling, bits, torch.float64
        )
        assert torch.allclose(found, expected, rtol=1e-9, atol=1e-9)


def _integer(
    bits: int, packed: bool, length: int, tokens: int, dtype: torch.dtype
) -> tuple[Any, ...]:
    """Operands of int8_attention, as _cached; packed: values are rows too."""
    query = heads(2, 6, length, 40, seed=1) / 4
    codes, scale, *_ = reference.quantize_per_token(query, 8)
    keys, values = (heads(2, 2, tokens, 40, seed=seed) for seed in (2, 3))
    rows = reference.quantize_heads(keys, bits, None)
    held = reference.quantize_heads(values, bits, None) if packed else values.to(dtype)
    return codes, scale, rows, held, attention_mask(2, length, tokens), 0.3, bits, dtype


class TestTiles:
    """Every tile that the autotuner may take gives the same attention."""

    @pytest.fixture
    def taken(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
        pytest.importorskip("triton")
        from tests.kernels.test_triton import take_only

        module = importlib.import_module("smoothq.kernels.triton.attention")

        def take(launcher: str, tile: str) -> None:
            tiles = module.DECODE_TILES if "decode" in launcher else module.PREFILL_TILES
            take_only(monkeypatch, module, launcher, "_attention_kernel", tiles[tile])

        return take

    @pytest.mark.parametrize(
        ("launcher", "tile", "length"),
        [
            ("_prefill_kernel", "small", 23),
            ("_prefill_kernel", "tall", 23),
            ("_decode_kernel", "short", 1),
            ("_decode_kernel", "long", 1),
        ],
    )
    @pytest.mark.parametrize(("bits", "group_size"), [(8, None), (4, 20)])
    def test_reference(self, taken, launcher, tile, length, bits, group_size) -> None:
        taken(launcher, tile)
        operators = importlib.import_module("smoothq.kernels.triton")
        query, *others = _cached(bits, group_size, length, 75, 2)
        query = query.half()
        exact = reference.cached_attention(query.double(), *others)
        placed = [o.to(DEVICE) if isinstance(o, Tensor) else o for o in (query, *others)]
        assert_close(operators.cached_attention(*placed).cpu(), exact, torch.float16)


class TestDispatch:
    def test_a_cpus_tensors_run_the_cpus_operators(self) -> None:
        operands = _cached(8, None, 3, 7, 2)
        expected = kernels.cpu.cached_attention(*operands)
        assert torch.equal(kernels.cached_attention(*operands), expected)

    @pytest.mark.parametrize(
        ("name", "operands"),
        [
            ("cached_attention", _cached(4, 20, 3, 7, 2)),
            ("int8_attention", _integer(8, True, 3, 7, torch.bfloat16)),
            ("int8_attention", _integer(8, False, 3, 7, torch.float32)),
        ],
    )
    def test_opcheck(self, name, operands) -> None:
        torch.library.opcheck(getattr(kernels, name).registered, operands)
