"""expert_weight_only_gemm: float rows of each expert by its own packed weight, as one by one."""

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

COUNTS = [(1,), (0, 3, 0, 1), (2, 5, 0, 0), (0, 0), (7, 1, 40, 4, 33)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def operands_of(
    counts: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    rows: int = 19,
    width: int = 128,
    *,
    bits: int = 4,
    groups: int = 1,
    multiplied: bool = False,
    half_scales: bool = False,
    biased: bool = False,
    behind: int = 0,
) -> tuple[Any, ...]:
    """Operands of `expert_weight_only_gemm`.

    Args:
        counts: rows of each expert.
        dtype: of the inputs and the biases.
        rows: of a weight.
        width: of a row.
        bits: of a code.
        groups: of a row.
        multiplied: groups have multipliers, and rows a scale.
        half_scales: in bfloat16.
        biased: with biases.
        behind: rows behind the last expert's.
    """
    draw, experts = Draw(len(counts)), range(len(counts))
    lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    codes = [draw.codes(rows, width, lowest=lowest, highest=highest) for _ in experts]
    scales = [draw.scales(rows, 1 if multiplied else groups) for _ in experts]
    return (
        draw.floats(sum(counts) + behind, width).to(dtype),
        torch.tensor(counts).cumsum(0),
        [pack(weight, bits).view(rows, -1) for weight in codes],
        [scale.bfloat16() for scale in scales] if half_scales else scales,
        [draw.multipliers(rows, groups) for _ in experts] if multiplied else [],
        [draw.floats(rows).to(dtype) for _ in experts] if biased else [],
        bits,
    )


CASES: dict[str, dict[str, Any]] = {
    "4 bits": {},
    "4 bits, groups": {"groups": 4, "half_scales": True},
    "4 bits, multipliers": {"groups": 4, "multiplied": True, "biased": True},
    "4 bits, odd width": {"width": 77, "biased": True},
    "4 bits, small groups": {"groups": 8, "multiplied": True},
    "4 bits, rows behind": {"groups": 2, "behind": 3, "biased": True},
    "8 bits": {"bits": 8, "biased": True},
    "8 bits, groups": {"bits": 8, "groups": 2, "half_scales": True},
    "8 bits, odd width": {"bits": 8, "width": 77, "rows": 33},
}


def one_by_one(
    x: Tensor,
    ends: Tensor,
    packed: list[Tensor],
    weight_scales: list[Tensor],
    multipliers: list[Tensor],
    biases: list[Tensor],
    bits: int,
) -> Tensor:
    """The product of each expert's rows by an operator of its own; zeros behind them."""
    result = x.new_zeros(len(x), len(packed[0]))
    start = 0
    for expert, end in enumerate(ends.tolist()):
        if end > start:
            result[start:end] = kernels.weight_only_gemm(
                x[start:end].clone(),
                packed[expert],
                weight_scales[expert],
                multipliers[expert] if multipliers else None,
                biases[expert] if biases else None,
                bits,
            )
        start = end
    return result


def exact_product(x: Tensor, *operands: Any) -> Tensor:
    exact: Tensor = reference.expert_weight_only_gemm(x.double(), *operands)
    return exact


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_on_a_cpu_it_is_every_experts_own_product_to_the_bit(case, counts, dtype) -> None:
    operands = operands_of(counts, dtype, **CASES[case])
    result = kernels.expert_weight_only_gemm(*operands)
    assert torch.equal(result, one_by_one(*operands))
    assert torch.equal(result, kernels.expert_weight_only_gemm.registered(*operands))
    if result.numel():
        assert_rounded_once(result, exact_product(*operands), dtype)


@pytest.mark.parametrize("isa", kernels.cpu.native.isas())
def test_every_instruction_set_gives_every_experts_own_product(isa) -> None:
    best = kernels.cpu.native.isa()
    try:
        kernels.cpu.native.use_isa(isa)
        for case in CASES.values():
            operands = operands_of(COUNTS[-1], **case)
            assert torch.equal(kernels.expert_weight_only_gemm(*operands), one_by_one(*operands))
    finally:
        kernels.cpu.native.use_isa(best)


def test_several_threads_share_experts_and_rows() -> None:
    threads = torch.get_num_threads()
    operands = operands_of((3, 0, 20, 1, 1), rows=301, width=512, groups=8, multiplied=True)
    expected = kernels.expert_weight_only_gemm(*operands)
    try:
        torch.set_num_threads(3)
        assert torch.equal(kernels.expert_weight_only_gemm(*operands), expected)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("ends", [[3, 2], [1, 9], [-1, 2]])
def test_ends_that_fall_or_lie_beyond_the_rows_are_refused(ends) -> None:
    operands = list(operands_of((2, 3)))
    operands[1] = torch.tensor(ends)
    operator = kernels.expert_weight_only_gemm
    for call in (operator, operator.registered):
        with pytest.raises((ValueError, RuntimeError), match="operand 'ends'"):
            call(*operands)


def test_weights_of_other_shapes_are_refused_by_name() -> None:
    operands = list(operands_of((2, 3)))
    weights = operands[2]
    for other in (weights[1][:, :-1], weights[1][:-1]):
        operands[2] = [weights[0], other]
        with pytest.raises(ValueError, match=r"operand '(packed|weight_scale)'"):
            kernels.expert_weight_only_gemm(*operands)


def test_a_compiler_sees_one_node() -> None:
    *operands, bits = operands_of((2, 0, 3), groups=2, multiplied=True, biased=True)
    torch.library.opcheck(kernels.expert_weight_only_gemm.registered, (*operands, bits))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(*given: Any) -> Tensor:
        return kernels.expert_weight_only_gemm(*given, bits) + 1

    torch.compiler.reset()
    expected = kernels.expert_weight_only_gemm(*operands, bits) + 1
    assert torch.equal(compiled(*operands), expected)


def test_pytorchs_own_operators_give_the_same() -> None:
    for case in CASES.values():
        operands = operands_of((0, 3, 2), **case)
        by_pytorch = kernels.cpu.expert_weight_only_gemm.__wrapped__(*operands)
        assert_rounded_once(by_pytorch, exact_product(*operands), torch.float32)


TRITON_COUNTS = [(1,), (0, 3, 0, 1), (0, 0), (7, 1, 40, 4, 0)]
TRITON_CASES = [case for case in CASES if case != "4 bits, small groups"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("counts", TRITON_COUNTS, ids=str)
@pytest.mark.parametrize("case", TRITON_CASES)
def test_as_a_triton_kernel(case, counts, dtype) -> None:
    operators = pytest.importorskip("smoothq.kernels.triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    operands = operands_of(counts, dtype, **CASES[case])
    exact = exact_product(*operands)
    placed = tree_map_only(Tensor, lambda operand: operand.to(device), operands)
    result = operators.expert_weight_only_gemm(*placed).cpu()
    if dtype == torch.bfloat16 and device == "cpu":  # Triton's interpreter cuts, and does not round
        torch.testing.assert_close(result.double(), exact, rtol=2**-7, atol=1e-4)
    elif result.numel():
        assert_rounded_once(result, exact, dtype)
    assert result.shape == exact.shape


def test_groups_that_do_not_fit_the_packed_blocks_are_refused_by_triton() -> None:
    operators = pytest.importorskip("smoothq.kernels.triton")
    with pytest.raises(NotImplementedError, match="groups of 16 columns"):
        operators.expert_weight_only_gemm(*operands_of((1,), **CASES["4 bits, small groups"]))
