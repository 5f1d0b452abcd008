"""The PTX of kernels/triton/nibbles.py, executed as it is written, without a GPU.

`execute` runs the instructions that the texts use on 32-bit registers; any other instruction is
an error. `Assembler` stands where Triton's interpreter has no inline assembly: it lays elements out
in registers as Triton does, so that the kernels' own operands and constraints are used.
"""

import importlib
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from smoothq.kernels import reference
from smoothq.rounding.packing import pack
from tests.kernels.test_gemm import Draw

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from smoothq.kernels import triton as operators  # noqa: E402
from smoothq.kernels.triton import launch, nibbles  # noqa: E402

Registers = np.ndarray[Any, np.dtype[np.uint32]]

MULTIPLIERS = [m for m in range(-15, 16) if m]
FLOAT_TEXTS = {"bfloat16": nibbles.BFLOAT16_PTX, "float16": nibbles.FLOAT16_PTX}
TEXTS = {"shifted": nibbles.SHIFTED_PTX, "multiplied": nibbles.MULTIPLIED_PTX, **FLOAT_TEXTS}


def execute(text: str, outputs: int, inputs: list[Registers]) -> list[Registers]:
    """What the text leaves in its outputs, $0 …; `inputs` are the operands after them."""
    body = re.fullmatch(r"\s*\{(.*)\}\s*", text, re.DOTALL)
    assert body is not None, "a block of its own, so that its registers do not clash"
    read_only = {f"${outputs + i}": value for i, value in enumerate(inputs)}
    written: dict[str, Registers] = {}
    declared = {f"${i}" for i in range(outputs)}

    def value(operand: str) -> Registers:
        if operand[0].isdigit():
            return np.full_like(inputs[0], int(operand, 0))
        return read_only[operand] if operand in read_only else written[operand]

    for statement in body[1].split(";"):
        opcode, *operands = statement.replace(",", " ").split() or [""]
        if opcode == ".reg":
            assert operands[0] == ".b32"
            declared.update(operands[1:])
        elif opcode:
            target, *sources = operands
            assert target in declared, f"{target} is not declared, or an input"
            written[target] = OPCODES[opcode](*map(value, sources))
    return [written[f"${i}"] for i in range(outputs)]


def permute(a: Registers, b: Registers, selector: Registers) -> Registers:
    """prmt.b32, default mode: four of the eight bytes of (b, a), or with 8 the sign of one."""
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    result = np.zeros_like(a)
    for position in range(4):
        choice = selector >> np.uint32(4 * position) & np.uint32(15)
        byte = both >> (choice & np.uint32(7)).astype(np.uint64) * np.uint64(8) & np.uint64(255)
        sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
        byte = np.where(choice & np.uint32(8), sign, byte)
        result |= byte.astype(np.uint32) << np.uint32(8 * position)
    return result


def halves(register: Registers, dtype: torch.dtype) -> Tensor:
    """The two 16-bit floats of a register, the lower one first, in float64: (…, 2)."""
    return torch.from_numpy(register.view(np.int16).copy()).view(dtype).double().view(-1, 2)


def multiply_add(dtype: torch.dtype, a: Registers, b: Registers, c: Registers) -> Registers:
    """fma.rn of two 16-bit floats, for results that need no rounding: any other is an error."""
    exact = halves(a, dtype) * halves(b, dtype) + halves(c, dtype)
    result = exact.to(dtype)
    assert torch.equal(result.double(), exact)
    return result.view(torch.int16).flatten().numpy().view(np.uint32)


OPCODES: dict[str, Any] = {
    "mov.b32": lambda a: a,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "xor.b32": lambda a, b: a ^ b,
    "shl.b32": lambda a, b: a << b,
    "shr.u32": lambda a, b: a >> b,
    "mad.lo.u32": lambda a, b, c: a * b + c,
    "prmt.b32": permute,
    "fma.rn.bf16x2": lambda a, b, c: multiply_add(torch.bfloat16, a, b, c),
    "fma.rn.f16x2": lambda a, b, c: multiply_add(torch.float16, a, b, c),
}


def every_byte() -> Registers:
    """All 256 bytes in each of the four positions, the other three at random: (1024,)."""
    generator = np.random.default_rng(0)
    rows = generator.integers(0, 256, (4, 256, 4), dtype=np.uint8)
    for position in range(4):
        rows[position, :, position] = np.arange(256)
    return rows.reshape(-1, 4).view(np.uint32).reshape(-1)


def codes_of(packed: Registers) -> tuple[Tensor, Tensor]:
    """The codes of the low and of the high nibble of each byte, as Python has them: (…, 4)."""
    rows = packed.view(np.uint8).reshape(-1, 4).tolist()
    low = [[(byte & 15) - 16 * (byte & 8 != 0) for byte in row] for row in rows]
    high = [[(byte >> 4) - 16 * (byte >> 7) for byte in row] for row in rows]
    return torch.tensor(low), torch.tensor(high)


def int8_of(register: Registers) -> Tensor:
    """The four bytes of a register as int8, the lowest first: (…, 4)."""
    return torch.from_numpy(register.view(np.int8).reshape(-1, 4).copy()).long()


class TestExecute:
    """The instructions by examples from NVIDIA's PTX manual, or by hand."""

    @staticmethod
    def result(instruction: str, *operands: int) -> int:
        registers = [np.array([operand], dtype=np.uint32) for operand in operands]
        names = ", ".join(f"${1 + i}" for i in range(len(operands)))
        return int(execute(f"{{ {instruction} $0, {names}; }}", 1, registers)[0][0])

    @pytest.mark.parametrize(
        ("instruction", "operands", "expected"),
        [
            ("shl.b32", (0x81234567, 4), 0x12345670),
            ("shr.u32", (0x81234567, 4), 0x08123456),
            ("mad.lo.u32", (0xFFFFFFFF, 2, 5), 3),
            ("prmt.b32", (0x33221100, 0x77665544, 0x3210), 0x33221100),
            ("prmt.b32", (0x33221100, 0x77665544, 0x6240), 0x66224400),
            ("prmt.b32", (0x33221100, 0x77665544, 0x0147), 0x00114477),
            ("prmt.b32", (0x33228000, 0x77665544, 0x0198), 0x0080FF00),
            ("fma.rn.bf16x2", (0x3F804000, 0x40003F80, 0x00004040), 0x400040A0),
            ("fma.rn.f16x2", (0x3C004000, 0x40003C00, 0x00004200), 0x40004500),
        ],
    )
    def test_instructions(self, instruction: str, operands: tuple[int, ...], expected: int) -> None:
        assert self.result(instruction, *operands) == expected

    def test_an_unknown_instruction_is_an_error(self) -> None:
        with pytest.raises(KeyError, match=r"add\.u32"):
            self.result("add.u32", 1, 2)

    def test_so_is_a_register_that_is_not_declared_or_not_written(self) -> None:
        one = [np.ones(1, dtype=np.uint32)]
        with pytest.raises(AssertionError, match="a is not declared"):
            execute("{ mov.b32 a, $1; mov.b32 $0, a; }", 1, one)
        with pytest.raises(AssertionError, match=r"\$1 is not declared, or an input"):
            execute("{ mov.b32 $1, $1; mov.b32 $0, $1; }", 1, one)
        with pytest.raises(KeyError):
            execute("{ .reg .b32 a; mov.b32 $0, a; }", 1, one)
        with pytest.raises(KeyError):
            execute("{ .reg .b32 a; mov.b32 a, $1; }", 1, one)

    def test_a_sum_that_is_rounded_is_an_error(self) -> None:
        with pytest.raises(AssertionError):
            self.result("fma.rn.bf16x2", 0x4380, 0x3F80, 0x3F80)  # 256 + 1 has 9 bits


class TestShifted:
    def test_every_byte_gives_16_times_both_codes(self) -> None:
        packed = every_byte()
        first, second = execute(nibbles.SHIFTED_PTX, 2, [packed])
        low, high = codes_of(packed)
        assert torch.equal(int8_of(first), 16 * low)
        assert torch.equal(int8_of(second), 16 * high)


class TestMultiplied:
    @staticmethod
    def products(packed: Registers, m_first: int, m_second: int) -> tuple[Tensor, Tensor]:
        """As `times_multipliers` passes it: m itself, and 256 − 8 m in both halves of a register.

        Four elements share an instance, so that each operand of 32 bits comes four times: m of the
        first half is $3 … $6, its addend $7 … $10, then those of the second half.
        """
        operands = [packed]
        for m in (m_first, m_second):
            addend = 0x01000100 - m * 0x00010001 * 8
            for operand in (m, addend):
                operands += [np.full_like(packed, operand % 2**32)] * 4
        first, second = execute(nibbles.MULTIPLIED_PTX, 2, operands)
        return int8_of(first), int8_of(second)

    @pytest.mark.parametrize("m_first", MULTIPLIERS)
    def test_every_byte_and_pair_of_multipliers(self, m_first: int) -> None:
        packed = every_byte()
        low, high = codes_of(packed)
        for m_second in MULTIPLIERS:
            first, second = self.products(packed, m_first, m_second)
            for found, code, m in ((first, low, m_first), (second, high, m_second)):
                assert torch.equal(found, code * m)


class TestFloats:
    @pytest.mark.parametrize("dtype", FLOAT_TEXTS)
    def test_every_byte_gives_both_codes_in_order(self, dtype: str) -> None:
        packed = every_byte()
        registers = execute(FLOAT_TEXTS[dtype], 4, [packed])
        pairs = [halves(register, getattr(torch, dtype)) for register in registers]
        low, high = codes_of(packed)
        assert torch.equal(torch.cat(pairs[:2], 1), low.double())
        assert torch.equal(torch.cat(pairs[2:], 1), high.double())


class Assembler:
    """Runs inline assembly on the tiles of Triton's interpreter, in place of the compiler.

    `pack` neighbouring elements of a row are one instance: of each operand they fill as many 32-bit
    registers as they need, the lowest bits first, and the operands follow one another.
    """

    def __init__(self) -> None:
        self.texts: set[str] = set()

    def run(
        self, text: str, constraints: str, tiles: list[Any], types: list[Any], pure: bool, pack: int
    ) -> Any:
        interpreter = importlib.import_module("triton.runtime.interpreter")
        assert pure
        shape = tiles[0].data.shape
        assert all(tile.data.shape == shape for tile in tiles)
        inputs = [register for tile in tiles for register in self.registers(tile.data, pack)]
        elements = [dtype.scalar for dtype in types]
        counts = [pack * element.primitive_bitwidth // 32 for element in elements]
        # Early clobber: an output is written before the last input is read.
        assert constraints == ",".join(["=&r"] * sum(counts) + ["r"] * len(inputs))
        self.texts.add(text)
        outputs = iter(execute(text, sum(counts), inputs))
        results = []
        for element, count in zip(elements, counts, strict=True):
            rows = np.stack([next(outputs) for _ in range(count)], -1)
            values = rows.view(interpreter._get_np_dtype(element)).reshape(shape)
            results.append(interpreter.TensorHandle(values, element))
        return Outputs(results)

    @staticmethod
    def registers(tile: Any, pack: int) -> list[Registers]:
        instances = np.ascontiguousarray(tile).reshape(-1, pack).view(np.uint32)
        return [np.ascontiguousarray(column) for column in instances.T]


class Outputs:
    """The results of an operation, as Triton's builder hands them out."""

    def __init__(self, results: list[Any]) -> None:
        self.results = results

    def get_result(self, index: int) -> Any:
        return self.results[index]


@triton.jit
def _floats_kernel(packed, first, second, OPERAND: tl.constexpr, BYTES: tl.constexpr):
    offsets = tl.arange(0, 2)[:, None] * BYTES + tl.arange(0, BYTES)[None, :]
    low, high = nibbles.as_floats(tl.load(packed + offsets), OPERAND, True)
    tl.store(first + offsets, low)
    tl.store(second + offsets, high)


@pytest.mark.skipif(not launch.INTERPRETED, reason="a GPU runs the texts themselves")
class TestInKernels:
    """The kernels with their PTX: operands, constraints and the use of the results."""

    @pytest.fixture
    def assembler(self, monkeypatch: pytest.MonkeyPatch) -> Assembler:
        interpreter = importlib.import_module("triton.runtime.interpreter")
        assembler = Assembler()
        monkeypatch.setattr(
            interpreter.InterpreterBuilder, "create_inline_asm", lambda _, *a: assembler.run(*a)
        )
        integer = importlib.import_module("smoothq.kernels.triton.integer_gemm")
        monkeypatch.setattr(integer, "runs_ptx", lambda device: True)
        return assembler

    @pytest.mark.parametrize(("tokens", "rows", "width"), [(3, 33, 64), (17, 5, 201)])
    def test_int4_gemm(self, tokens: int, rows: int, width: int, assembler: Assembler) -> None:
        draw = Draw()
        a, w = draw.codes(tokens, width), draw.codes(rows, width, lowest=-8, highest=7)
        found = operators.int4_gemm(
            a, torch.ones(1, 1), pack(w, 4), torch.ones(rows), None, None, torch.float32
        )
        assert torch.equal(found.long(), a.long() @ w.long().t())
        assert assembler.texts == {nibbles.SHIFTED_PTX}

    @pytest.mark.parametrize("size", [32, 64, 96])
    @pytest.mark.parametrize("tokens", [3, 17])
    def test_int4_gemm_with_multipliers(self, size: int, tokens: int, assembler: Assembler) -> None:
        draw = Draw()
        a, w = draw.codes(tokens, 3 * size), draw.codes(33, 3 * size, lowest=-8, highest=7)
        operands = (a, torch.ones(1, 1), pack(w, 4), torch.ones(33), draw.multipliers(33, 3), None)
        found = operators.int4_gemm(*operands, torch.float32)
        assert torch.equal(found.double(), reference.int4_gemm(*operands, torch.float64))
        assert assembler.texts == {nibbles.MULTIPLIED_PTX}

    @pytest.mark.parametrize("dtype", FLOAT_TEXTS)
    def test_floats(self, dtype: str, assembler: Assembler) -> None:
        packed = every_byte()
        first, second = (torch.empty(2, 2048, dtype=getattr(torch, dtype)) for _ in range(2))
        rows = torch.from_numpy(packed.view(np.int8).reshape(2, 2048).copy())
        _floats_kernel[(1,)](rows, first, second, getattr(tl, dtype), 2048)
        low, high = codes_of(packed)
        assert torch.equal(first.long().flatten(), low.flatten())
        assert torch.equal(second.long().flatten(), high.flatten())
        assert assembler.texts == {FLOAT_TEXTS[dtype]}
