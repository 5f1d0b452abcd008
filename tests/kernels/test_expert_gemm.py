"""expert_gemm: the rows of each expert by its own weight, equal to the products one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from smoothq import kernels
from smoothq.kernels import reference
from smoothq.rounding.packing import pack
from tests.kernels.test_gemm import Draw, assert_rounded_once

COUNTS = [(1,), (0, 3, 0, 1), (2, 5, 0, 0), (0, 0), (7, 1, 130, 4, 66)]


def operands_of(
    counts: tuple[int, ...],
    rows: int = 19,
    width: int = 128,
    *,
    packed: bool = False,
    groups: int = 0,
    biased: bool = False,
    behind: int = 0,
    one_scale: bool = False,
) -> tuple[Any, ...]:
    """Operands of `expert_gemm` but for the dtype.

    Args:
        counts: rows of each expert.
        rows: of a weight.
        width: of a row.
        packed: 4-bit weights.
        groups: multipliers a row; 0 for none.
        biased: with biases.
        behind: rows behind the last expert's.
        one_scale: the scale of all rows is one.
    """
    draw, total = Draw(len(counts)), sum(counts) + behind
    experts = range(len(counts))
    lowest, highest = (-8, 7) if packed else (-128, 127)
    weights = [draw.codes(rows, width, lowest=lowest, highest=highest) for _ in experts]
    if packed:
        weights = [pack(weight, 4).view(rows, -1) for weight in weights]
    return (
        draw.codes(total, width),
        draw.scales(1 if one_scale else total, 1),
        torch.tensor(counts).cumsum(0),
        weights,
        [draw.scales(rows) for _ in experts],
        [draw.multipliers(rows, groups) for _ in experts] if groups else [],
        [draw.floats(rows) for _ in experts] if biased else [],
    )


CASES: dict[str, dict[str, Any]] = {
    "int8": {},
    "int8, biases": {"biased": True},
    "int8, one scale": {"one_scale": True},
    "int8, odd width": {"width": 77, "rows": 33},
    "packed": {"packed": True},
    "packed, odd width": {"packed": True, "width": 77},
    "packed, multipliers": {"packed": True, "groups": 4, "biased": True},
    "packed, rows behind": {"packed": True, "groups": 2, "behind": 3},
    "int8, rows behind": {"behind": 3, "biased": True},
}


def one_by_one(
    codes: Tensor,
    scale: Tensor,
    ends: Tensor,
    weights: list[Tensor],
    weight_scales: list[Tensor],
    multipliers: list[Tensor],
    biases: list[Tensor],
    dtype: torch.dtype,
) -> Tensor:
    """The product of each expert's rows by an operator of its own; zeros behind them."""
    result = codes.new_zeros(len(codes), len(weights[0]), dtype=dtype)
    start = 0
    for expert, end in enumerate(ends.tolist()):
        if end > start:
            steps = scale if len(scale) == 1 else scale[start:end]
            given: list[Any] = [codes[start:end], steps, weights[expert], weight_scales[expert]]
            operator = kernels.int8_gemm
            if weights[expert].dtype == torch.uint8:
                operator = kernels.int4_gemm
                given.append(multipliers[expert] if multipliers else None)
            given.append(biases[expert] if biases else None)
            result[start:end] = operator(*given, dtype)
        start = end
    return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_on_a_cpu_it_is_every_experts_own_product_to_the_bit(case, counts, dtype) -> None:
    operands = operands_of(counts, **CASES[case])
    result = kernels.expert_gemm(*operands, dtype)
    assert torch.equal(result, one_by_one(*operands, dtype))
    assert torch.equal(result, kernels.expert_gemm.registered(*operands, dtype))
    if result.numel():
        assert_rounded_once(result, reference.expert_gemm(*operands, torch.float64), dtype)


@pytest.mark.parametrize("isa", kernels.cpu.native.isas())
def test_every_instruction_set_gives_the_same(isa) -> None:
    best = kernels.cpu.native.isa()
    for case in CASES.values():
        operands = operands_of(COUNTS[-1], **case)
        expected = kernels.expert_gemm(*operands, torch.float32)
        try:
            kernels.cpu.native.use_isa(isa)
            assert torch.equal(kernels.expert_gemm(*operands, torch.float32), expected)
        finally:
            kernels.cpu.native.use_isa(best)


def test_several_threads_share_experts_and_rows() -> None:
    threads = torch.get_num_threads()
    operands = operands_of((3, 0, 50, 1, 1), rows=301, width=512, packed=True, groups=8)
    expected = kernels.expert_gemm(*operands, torch.float32)
    try:
        torch.set_num_threads(3)
        assert torch.equal(kernels.expert_gemm(*operands, torch.float32), expected)
    finally:
        torch.set_num_threads(threads)


def test_experts_of_both_forms_run_together() -> None:
    """As where few tokens meet packed codes, and many their int8 copies."""
    packed = operands_of((2, 9), packed=True, groups=4)
    codes, scale, ends, weights, steps, multipliers, biases = packed
    multiplied = reference.multiplied_weight(
        reference.unpack_int4(weights[1], codes.shape[1]), multipliers[1]
    )
    mixed = (codes, scale, ends, [weights[0], multiplied], steps, multipliers, biases)
    expected = kernels.expert_gemm(*packed, torch.float32)
    assert torch.equal(kernels.expert_gemm(*mixed, torch.float32), expected)


@pytest.mark.parametrize("ends", [[3, 2], [1, 9], [-1, 2]])
def test_ends_that_fall_or_lie_beyond_the_rows_are_refused(ends) -> None:
    operands = list(operands_of((2, 3)))
    operands[2] = torch.tensor(ends)
    for operator in (kernels.expert_gemm, kernels.expert_gemm.registered):
        with pytest.raises((ValueError, RuntimeError), match="operand 'ends'"):
            operator(*operands, torch.float32)


def test_a_weight_of_another_shape_is_refused_by_name() -> None:
    operands = list(operands_of((2, 3)))
    operands[3] = [operands[3][0], operands[3][1][:, :-1]]
    with pytest.raises(ValueError, match="operand 'weight'"):
        kernels.expert_gemm(*operands, torch.float32)


def test_a_compiler_sees_one_node() -> None:
    *operands, last = (*operands_of((2, 0, 3), packed=True, groups=2), torch.float32)
    torch.library.opcheck(kernels.expert_gemm.registered, (*operands, last))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(*given: Any) -> Tensor:
        return kernels.expert_gemm(*given, torch.float32) + 1

    torch.compiler.reset()
    assert torch.equal(compiled(*operands), kernels.expert_gemm(*operands, last) + 1)


def test_pytorchs_own_operators_give_the_same() -> None:
    for case in CASES.values():
        operands = operands_of((0, 3, 2), **case)
        by_pytorch = kernels.cpu.expert_gemm.__wrapped__(*operands, torch.float32)
        exact = reference.expert_gemm(*operands, torch.float64)
        assert_rounded_once(by_pytorch, exact, torch.float32)


TRITON_COUNTS = [(1,), (0, 3, 0, 1), (0, 0), (7, 1, 40, 4, 0)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("counts", TRITON_COUNTS, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_as_a_triton_kernel(case, counts, dtype) -> None:
    operators = pytest.importorskip("smoothq.kernels.triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    operands = operands_of(counts, **CASES[case])
    exact = reference.expert_gemm(*operands, torch.float64)
    placed = tree_map_only(Tensor, lambda operand: operand.to(device), operands)
    result = operators.expert_gemm(*placed, dtype).cpu()
    if dtype == torch.bfloat16 and device == "cpu":  # Triton's interpreter cuts, and does not round
        torch.testing.assert_close(result.double(), exact, rtol=2**-7, atol=1e-4)
    elif result.numel():
        assert_rounded_once(result, exact, dtype)
    assert result.shape == exact.shape
