"""The CPU operators' loops for Arm, compiled for it and run in an emulator, equal the reference.

PyTorch does not run there: `loops.cpp` takes tasks as bytes and answers with the results' bytes.
"""

import importlib.util
import os
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from smoothq import kernels
from smoothq.kernels.cpu.native import ELEMENTS, MODES, SCALINGS
from smoothq.kernels.reference import by_group, dequantize_heads, multiplied_weight, unpack_int4
from smoothq.transforms.hadamard import Hadamard
from tests.kernels.extremes import EXTREMES
from tests.kernels.test_fp_gemm import FORMS, WORD_BITS, equal_bits, fp_weight, word_weight
from tests.kernels.test_gemm import Draw, assert_rounded_once

ROOT = Path(__file__).parents[2]
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64-static"
MISSING = [tool for tool in (COMPILER, EMULATOR) if shutil.which(tool) is None]
ISAS = ("i8mm", "dotprod", "plain")  # the best first
QUANTIZE, ROTATE, PRODUCT, SCALE, UNPACK, FLOAT_PRODUCT, DEQUANTIZE, EXPAND, FP_QUANTIZE = range(9)
EMPTY = torch.empty(0)

reference = kernels.reference
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`loops.cpp`, linked with the loops of every instruction set of Arm."""
    spec = importlib.util.spec_from_file_location("setup_of_smoothq", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    setup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup)
    folder, sources = tmp_path_factory.mktemp("aarch64"), ROOT / setup.SOURCES
    flags = [*setup.FLAGS, *setup.LOOP_FLAGS, f"-I{sources}", "-Wall", "-Werror"]
    objects = []
    for name, allowed in setup.ISAS["aarch64"].items():
        objects.append(str(folder / f"{name}.o"))
        build = [COMPILER, *flags, *allowed, f"-DISA={name}", "-c", str(sources / "isa.cpp")]
        subprocess.run([*build, "-o", objects[-1]], check=True)
    rest = [str(sources / "isas.cpp"), str(Path(__file__).with_name("loops.cpp"))]
    build = [COMPILER, *flags, "-static", *rest, *objects, "-o", str(folder / "loops")]
    subprocess.run(build, check=True)
    return folder / "loops"


def emulate(
    program: Path, *arguments: str, cpu: str = "max", isa: str = "", stdin: bytes = b""
) -> subprocess.CompletedProcess[bytes]:
    command = [EMULATOR, "-cpu", cpu, str(program), *arguments]
    environment = os.environ | {"SMOOTHQ_CPU_ISA": isa}
    return subprocess.run(command, input=stdin, capture_output=True, env=environment, check=False)


def task(loop: int, *operands: int | float | Tensor) -> bytes:
    """A task's bytes, as `loops.cpp` reads them."""
    parts = [struct.pack("q", loop)]
    for operand in operands:
        if isinstance(operand, Tensor):
            data = operand.contiguous().flatten().view(torch.uint8).numpy().tobytes()
            parts.append(struct.pack("q", operand.numel()) + data)
        else:
            parts.append(struct.pack("q" if isinstance(operand, int) else "f", operand))
    return b"".join(parts)


class Answers:
    """The results of tasks, taken in the tasks' order."""

    def __init__(self, program: Path, isa: str, tasks: list[bytes]) -> None:
        ran = emulate(program, isa=isa, stdin=b"".join(tasks))
        assert ran.returncode == 0, ran.stderr.decode()
        self.left = memoryview(bytearray(ran.stdout))

    def take(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        count = torch.Size(shape).numel() * dtype.itemsize
        taken, self.left = self.left[:count], self.left[count:]
        return torch.frombuffer(taken, dtype=dtype).reshape(shape)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> str:
    return request.param


def test_a_processor_runs_the_best_that_it_has(program) -> None:
    assert emulate(program, "isas").stdout.decode().split() == list(ISAS)
    old = emulate(program, "isas", cpu="cortex-a53")
    assert old.stdout.decode().split() == ["plain"]
    refused = emulate(program, cpu="cortex-a53", isa="i8mm", stdin=task(UNPACK, 0, 0, 1))
    assert refused.returncode != 0
    assert b"i8mm is not of this processor, which has: plain" in refused.stderr


def test_integer_products(program, isa) -> None:
    cases, tasks = [], []
    draw = Draw(1)
    for width, groups in ((384, 12), (384, 6), (384, 1), (1, 1), (63, 1), (97, 1), (130, 1)):
        for tokens in (1, 2, 3, 5):
            rows = 7
            codes, weight = draw.codes(tokens, width), draw.codes(rows, width)
            packed = draw.codes(rows, (width + 1) // 2).view(torch.uint8)
            multiplier = draw.multipliers(rows, groups)
            scales = draw.scales(tokens, 1), draw.scales(rows)
            bias = draw.floats(rows)
            sizes = tokens, rows, width, groups
            tasks += [
                task(PRODUCT, *sizes, codes, weight, EMPTY, EMPTY, *scales, bias),
                task(PRODUCT, *sizes, codes, EMPTY, packed, multiplier, *scales, EMPTY),
            ]
            unpacked = multiplied_weight(unpack_int4(packed, width), multiplier)
            cases += [(codes, weight, *scales, bias), (codes, unpacked, *scales, None)]
    answers = Answers(program, isa, tasks)
    for codes, weight, scale, row_scale, bias in cases:
        total = (codes.long() @ weight.long().t()).float()  # below 2²⁴
        expected = total * scale * row_scale
        result = answers.take(*total.shape)
        assert torch.equal(result, expected if bias is None else expected + bias)


def test_the_largest_sums_are_exact(program, isa) -> None:
    lowest = torch.full((5, 65_000), -128, dtype=torch.int8)
    ones = torch.ones(5)
    stored = task(PRODUCT, 5, 5, 65_000, 1, lowest, lowest, EMPTY, EMPTY, ones, ones, EMPTY)
    assert (Answers(program, isa, [stored]).take(5, 5) == 128 * 128 * 65_000).all()


def test_scaling_and_unpacking(program, isa) -> None:
    draw = Draw(2)
    totals = (draw.floats(3, 50) * 1e6).int()
    scales = draw.scales(3, 1), draw.scales(50)
    widths = ((384, 12), (96, 2), (97, 1), (5, 1))
    stored = [
        (draw.codes(4, (width + 1) // 2).view(torch.uint8), draw.multipliers(4, groups))
        for width, groups in widths
    ]
    tasks = [task(SCALE, 3, 50, totals, *scales, EMPTY)] + [
        task(UNPACK, 4, width, groups, *operands)
        for (width, groups), operands in zip(widths, stored, strict=True)
    ]
    answers = Answers(program, isa, tasks)
    assert torch.equal(answers.take(3, 50), totals.float() * scales[0] * scales[1])
    for (width, _), (packed, multiplier) in zip(widths, stored, strict=True):
        expected = multiplied_weight(unpack_int4(packed, width), multiplier)
        assert torch.equal(answers.take(4, width, dtype=torch.int8), expected)


def test_quantizers(program, isa) -> None:
    multiplier = torch.tensor([1, 5, 15] * 8, dtype=torch.int8)
    step = 0.125
    modes = [
        ("token", 8, 0, EMPTY, lambda x: reference.quantize_per_token(x, 8)),
        ("full_range", 4, 0, EMPTY, lambda x: reference.quantize_per_token(x, 4, 1.0, True)),
        ("smoothed", 4, 0, multiplier, lambda x: reference.quantize_smoothed(x, multiplier, 4)),
        ("static", 4, 0, EMPTY, lambda x: reference.static_quantize(x, torch.tensor(step), 4)),
        ("groups", 4, 8, EMPTY, lambda x: reference.quantize_token_groups(x, 4, 8)),
    ]
    inputs = [*EXTREMES.values(), Draw().floats(3, 24)]
    answers = Answers(
        program,
        isa,
        [
            task(QUANTIZE, 3, 24, MODES[name], bits, group, 8, 1.0, step, x, factors)
            for name, bits, group, factors, _ in modes
            for x in inputs
        ],
    )
    for name, *_, define in modes:
        for x in inputs:
            expected = define(x)
            codes, scale = answers.take(3, 24, dtype=torch.int8), answers.take(3, 1)
            assert torch.equal(codes, expected.codes), name
            wanted = expected.scale.reshape(-1, 1).expand(3, 1)
            assert torch.equal(scale.nan_to_num(-1), wanted.nan_to_num(-1)), name


@pytest.mark.parametrize("order", [64, 96, 640])
def test_rotations(program, isa, order) -> None:
    rotation = Hadamard.of(order, seed=0)
    signs, (left, right) = rotation.signs(), rotation.factors()
    x = Draw().floats(3, order)
    stored = task(ROTATE, 3, order, left.shape[0], right.shape[0], x, signs, left)
    exact = reference.hadamard(x.double(), signs, left, right)
    assert torch.allclose(Answers(program, isa, [stored]).take(3, order).double(), exact, atol=1e-5)


def test_float_activations(program, isa) -> None:
    draw = Draw(3)
    cases, tasks = [], []
    for bits, groups, factors in ((4, 12, False), (4, 6, True), (8, 6, False), (8, 1, False)):
        tokens, rows, width = 5, 7, 384
        x = draw.floats(tokens, width)
        packed = draw.codes(rows, width * bits // 8)
        packed = packed.view(torch.uint8) if bits == 4 else packed
        scale = draw.scales(rows, 1 if factors else groups)
        multiplier = draw.multipliers(rows, groups) if factors else None
        weight = (EMPTY, packed) if bits == 4 else (packed, EMPTY)
        for loop in (FLOAT_PRODUCT, DEQUANTIZE):
            operands = x, *weight, EMPTY, scale, EMPTY, EMPTY if multiplier is None else multiplier
            tasks.append(task(loop, tokens, rows, width, groups, bits, 0, 0.0, *operands))
        cases.append((x, packed, scale, multiplier, bits))
    answers = Answers(program, isa, tasks)
    for x, packed, scale, multiplier, bits in cases:
        result = answers.take(x.shape[0], packed.shape[0])
        exact = reference.weight_only_gemm(x.double(), packed, scale, multiplier, None, bits)
        assert_rounded_once(result, exact, torch.float32)
        codes = unpack_int4(packed, x.shape[1]) if bits == 4 else packed
        step = scale if multiplier is None else scale * multiplier
        assert torch.equal(answers.take(*codes.shape), by_group(codes.float(), step))


def test_floating_point_codes(program, isa) -> None:
    draw, tokens, rows = Draw(4), 5, 7
    x = draw.floats(tokens, 192)
    cases, tasks = [], []
    for form in FORMS:
        for width in (192, 96):
            packed, scale, tensor_scale, element = fp_weight(draw, rows, width, form)
            groups = scale.shape[1]
            if FORMS[form][2] == 64 and width % 64:
                continue
            bytes_, pairs = (packed, EMPTY) if element == "e4m3" else (EMPTY, packed)
            steps = (scale, EMPTY) if scale.dtype != torch.uint8 else (EMPTY, scale)
            step = 0.0 if tensor_scale is None else tensor_scale.item()
            inputs = x[:, :width].contiguous()
            for loop in (FLOAT_PRODUCT, DEQUANTIZE) if width % 64 == 0 else (DEQUANTIZE,):
                sizes = tokens, rows, width, groups, 0, ELEMENTS[element], step
                tasks.append(task(loop, *sizes, inputs, bytes_, pairs, EMPTY, *steps, EMPTY))
                cases.append((loop, inputs, packed, scale, tensor_scale, None, element))
    answers = Answers(program, isa, tasks)
    for loop, inputs, packed, scale, *rest in cases:
        if loop == FLOAT_PRODUCT:
            exact = reference.fp_gemm(inputs.double(), packed, scale, *rest)
            assert_rounded_once(answers.take(tokens, rows), exact, torch.float32)
        else:
            values = reference.fp_values(packed, rest[2], inputs.shape[1])
            expected = by_group(values, reference.fp_scales(scale, rest[0]))
            assert torch.equal(answers.take(*expected.shape), expected)


def test_codes_in_words(program, isa) -> None:
    draw, tokens, rows = Draw(4), 5, 7
    cases, tasks = [], []
    for bits in WORD_BITS:
        for width, groups in ((192, 6), (192, 1), (97, 1)):
            words, scale = word_weight(draw, rows, width, bits, groups)
            scale = scale.float()
            sizes = tokens, rows, width, groups, bits, 0, 0.0
            tasks.append(task(DEQUANTIZE, *sizes, EMPTY, EMPTY, EMPTY, words, scale, EMPTY, EMPTY))
            cases.append((words, scale, width, bits))
    answers = Answers(program, isa, tasks)
    for words, scale, width, bits in cases:
        codes = reference.unpack_words(words, width, bits)
        assert torch.equal(answers.take(rows, width), by_group(codes.float(), scale))


def test_values_of_codes(program, isa) -> None:
    inputs = [*EXTREMES.values(), Draw().floats(3, 24)]
    forms = [(element, scaling) for element in ELEMENTS for scaling in SCALINGS]
    answers = Answers(
        program,
        isa,
        [
            task(FP_QUANTIZE, 3, 24, ELEMENTS[element], SCALINGS[scaling], 16, 0.01, x)
            for element, scaling in forms
            for x in inputs
        ],
    )
    for element, scaling in forms:
        for x in inputs:
            step = torch.tensor([0.01])
            expected = reference.fp_quantize(x, element, scaling, 16, step)
            assert equal_bits(answers.take(3, 24), expected), (element, scaling)


def test_rows_of_a_cache(program, isa) -> None:
    formats = [(8, None), (4, None), (8, 20), (4, 4)]
    stored = [reference.quantize_heads(Draw(5).floats(6, 40), *how) for how in formats]
    tasks = [
        task(EXPAND, 6, rows.shape[-1], 40, group_size or 40, bits, rows)
        for (bits, group_size), rows in zip(formats, stored, strict=True)
    ]
    answers = Answers(program, isa, tasks)
    for (bits, group_size), rows in zip(formats, stored, strict=True):
        expected = dequantize_heads(rows, bits, group_size, torch.float32)
        assert torch.equal(answers.take(6, 40), expected)
