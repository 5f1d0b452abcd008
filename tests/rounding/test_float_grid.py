"""Floating-point grids: FP8 by matrix, row and block, MXFP8, MXFP4, NVFP4."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from smoothq.kernels.formats import E2M1, E4M3, FORMATS
from smoothq.recipe.recipe import Gptq
from smoothq.rounding.float_grid import FloatGrid, block_group
from smoothq.rounding.gptq import factorise, gptq
from smoothq.rounding.rtn import round_to_nearest

FEW = settings(max_examples=20, deadline=None, derandomize=True)
WIDTH = 192
KINDS = ["fp8 tensor", "fp8 channel", "fp8 block", "mxfp8", "mxfp4", "nvfp4"]
each_kind = pytest.mark.parametrize("kind", KINDS)
each_clip = pytest.mark.parametrize("clip", [False, True], ids=["absmax", "clip search"])


def grid(kind: str, clip: bool = False, width: int = WIDTH) -> FloatGrid:
    match kind.split():
        case ["fp8", "block"]:
            return FloatGrid(8, "block", block_group(width), "e4m3", "float", clip)
        case ["fp8", granularity]:
            return FloatGrid(8, granularity, width, "e4m3", "float", clip)  # type: ignore[arg-type]
        case ["nvfp4"]:
            return FloatGrid(4, "group", 16, "e2m1", "e4m3", clip)
    bits = int(kind[-1])
    return FloatGrid(bits, "group", 32, "e4m3" if bits == 8 else "e2m1", "e8m0", clip)


def matrix(rows: int, columns: int = WIDTH, seed: int = 0) -> Tensor:
    """Weights with heavy tails, float32."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator).pow(3) * 0.02


def by_the_book(weight: Tensor, kind: str) -> Tensor:
    """Plain rounding in another way: PyTorch's float8, a table of E2M1, scales cut by cut."""
    rounded = torch.empty_like(weight)
    rows, columns = {
        "fp8 tensor": weight.shape,
        "fp8 channel": (1, weight.shape[1]),
        "fp8 block": (128, 128),
        "nvfp4": (1, 16),
    }.get(kind, (1, 32))
    whole = weight.abs().max() / (448 * 6)
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    for row in range(0, weight.shape[0], rows):
        for column in range(0, weight.shape[1], columns):
            cut = slice(row, row + rows), slice(column, column + columns)
            part, most = weight[cut], weight[cut].abs().max()
            if kind.startswith("fp8"):
                scale = most / 448
            elif kind == "nvfp4":
                scale = (most / 6 / whole).to(torch.float8_e4m3fn).float() * whole
            else:
                scale = 2.0 ** (most.log2().floor() - (8 if kind == "mxfp8" else 2))
            if kind in ("mxfp4", "nvfp4"):
                near = (part / scale).clamp(-6, 6)
                rank = torch.bucketize(near.abs(), (table[1:] + table[:-1]) / 2)
                values = table[rank] * near.sign()
            else:
                values = (part / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float()
            rounded[cut] = values * scale
    return rounded


@each_kind
@pytest.mark.parametrize("shape", [(3, WIDTH), (130, WIDTH), (200, 320)])
def test_plain_rounding_is_the_formats_own(kind: str, shape: tuple[int, int]) -> None:
    weight = matrix(*shape)
    found = round_to_nearest(weight, grid(kind, width=shape[1])).dequantize()
    torch.testing.assert_close(found, by_the_book(weight, kind), rtol=1e-6, atol=0)


@each_clip
@each_kind
def test_what_is_stored_is_read_back(kind: str, clip: bool) -> None:
    weight, form = matrix(130), grid(kind, clip)
    rounded = round_to_nearest(weight, form)
    stored, like = form.store(rounded.scales), form.stored_scales(*weight.shape)
    assert {name: (t.shape, t.dtype) for name, t in stored.items()} == {
        name: (t.shape, t.dtype) for name, t in like.items()
    }
    again = form.scales_of(stored, *weight.shape)
    assert torch.equal(
        again.step(torch.float32).expand(130, -1), rounded.scales.step(torch.float32)
    )
    packed = form.pack(rounded.codes)
    assert (packed.shape, packed.dtype) == (
        form.packed_like(*weight.shape).shape,
        form.packed_like(*weight.shape).dtype,
    )
    assert torch.equal(form.unpack(packed, WIDTH), rounded.codes)


@each_kind
def test_no_other_code_is_nearer(kind: str) -> None:
    weight, form = matrix(9), grid(kind)
    rounded = round_to_nearest(weight, form)
    step = rounded.scales.step_by_column(WIDTH, torch.float32)
    error = (rounded.dequantize() - weight).abs()
    for moved in (rounded.codes - 1, rounded.codes + 1):
        codes = moved.clamp(form.lowest, form.highest).float()
        assert (error <= (form.values(codes) * step - weight).abs() * (1 + 1e-6)).all()


@each_kind
def test_the_search_for_scales_is_never_worse(kind: str) -> None:
    weight = matrix(130)
    errors = [
        (round_to_nearest(weight, grid(kind, clip)).dequantize() - weight).abs().pow(2.4).sum()
        for clip in (False, True)
    ]
    assert errors[1] <= errors[0]


@each_clip
@each_kind
def test_zeros_stay_zero(kind: str, clip: bool) -> None:
    weight = matrix(4)
    weight[1] = 0
    weight[:, 32:64] = 0
    rounded = round_to_nearest(weight, grid(kind, clip)).dequantize()
    assert torch.equal(rounded[1], torch.zeros(WIDTH))
    assert not rounded[:, 32:64].any()
    assert not round_to_nearest(torch.zeros(3, WIDTH), grid(kind, clip)).dequantize().any()


@each_kind
def test_gptq_has_less_error_of_the_output(kind: str) -> None:
    weight, x = matrix(24), torch.randn(512, WIDTH) @ torch.randn(WIDTH, WIDTH)
    factor = factorise(x.T.double() @ x.double(), Gptq(), "here")
    form = grid(kind)
    wanted = x @ weight.T
    plain, compensated = (
        (x @ rounded.dequantize().T - wanted).norm()
        for rounded in (round_to_nearest(weight, form), gptq(weight, factor, form, 32))
    )
    assert compensated < 0.8 * plain


def test_matrices_that_share_a_tensors_scale() -> None:
    weight, form = matrix(4), grid("nvfp4")
    shared = round_to_nearest(weight, form, largest=4 * float(weight.abs().max()))
    alone = round_to_nearest(weight, form)
    assert torch.equal(shared.scales.scale, 4 * alone.scales.scale)
    assert (shared.dequantize() - weight).norm() < 1.2 * (alone.dequantize() - weight).norm()


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
class TestRanks:
    def test_they_stand_in_the_order_of_the_values(self, form) -> None:
        values = form.values(torch.arange(-form.highest, form.highest + 1).float())
        assert (values.diff() > 0).all()
        assert values[-1] == form.largest

    def test_codes_are_ranks_with_a_sign_bit(self, form) -> None:
        ranks = torch.arange(-form.highest, form.highest + 1).to(torch.int8)
        assert torch.equal(form.ranks_of(form.codes(ranks)), ranks)

    @FEW
    @given(seed=st.integers(0, 2**32 - 1), size=st.sampled_from([1e-3, 1.0, 30.0]))
    def test_a_rounded_position_is_the_nearest_rank(self, form, seed: int, size: float) -> None:
        x = torch.randn(500, generator=torch.Generator().manual_seed(seed)) * size
        kind = grid("fp8 channel" if form is E4M3 else "mxfp4")
        positions = kind.positions(x)
        near = positions.round().clamp(kind.lowest, kind.highest)
        middle = (positions - positions.floor() - 0.5).abs() < 1e-4  # both are as near
        assert torch.equal(near[~middle], form.ranks(x)[~middle])


def test_ties_go_to_the_even_mantissa() -> None:
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0])
    assert E2M1.values(E2M1.ranks(ties)).tolist() == [0, 1, 1, 2, 2, 4, 4, 6]
