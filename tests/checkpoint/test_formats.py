"""Models that are quantized already are read as what their writers decode their weights to.

The fixtures are by the writers themselves: see scripts/make_quantized_fixtures.py.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig

from smoothq.checkpoint.formats.bits import fp8, unpack
from smoothq.checkpoint.formats.choose import as_float
from smoothq.checkpoint.formats.decoded import DecodedTensors
from smoothq.checkpoint.stored import WeightFiles

FIXTURES = Path(__file__).parents[1] / "fixtures" / "quantized"
NAMES = sorted(path.name for path in FIXTURES.iterdir())


def read(path: Path, quantization: dict[str, object]) -> DecodedTensors:
    """The tensors of a file, decoded to bfloat16."""
    config, format = as_float(LlamaConfig(quantization_config=quantization), "model")
    assert format is not None
    assert config.dtype == torch.bfloat16  # where the source's names none
    return DecodedTensors(WeightFiles(dict.fromkeys(load_file(path), path)), format, "model")


def config_of(name: str) -> dict[str, object]:
    """The quantization_config of a fixture."""
    config: dict[str, object] = json.loads(
        (FIXTURES / name / "quantization_config.json").read_text()
    )
    return config


def decoded(name: str) -> DecodedTensors:
    """The tensors of a fixture, decoded to bfloat16."""
    return read(FIXTURES / name / "stored.safetensors", config_of(name))


@pytest.mark.parametrize("name", NAMES)
def test_a_weight_is_what_its_writer_decodes_it_to(name) -> None:
    tensors, expected = decoded(name), load_file(FIXTURES / name / "expected.safetensors")
    assert tensors.specs.keys() == expected.keys()  # no scale is taken for a weight
    for weight, wanted in expected.items():
        assert tensors.specs[weight] == (tuple(wanted.shape), torch.bfloat16)
        assert torch.equal(tensors.tensor(weight), wanted), weight


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("count", [1, 7, 64])
def test_rows_are_those_of_the_whole(name, count) -> None:
    tensors = decoded(name)
    for weight in tensors.specs:
        rows = list(tensors.rows(weight, count))
        assert {len(part) for part in rows[:-1]} <= {count}
        assert torch.equal(torch.cat(rows), tensors.tensor(weight))


def test_short_blocks_are_of_the_configs_size_though_others_would_divide_evenly(tmp_path) -> None:
    codes, scale = torch.ones(48, 32).to(torch.float8_e4m3fn), torch.tensor([[2.0], [4.0]])
    stored = {"linear.weight": codes, "linear.weight_scale_inv": scale}
    save_file(stored, tmp_path / "model.safetensors")
    quantization = {"quant_method": "fp8", "weight_block_size": [32, 32]}
    weight = read(tmp_path / "model.safetensors", quantization).tensor("linear.weight")
    assert weight[:, 0].tolist() == [2] * 32 + [4] * 16


def test_an_order_of_columns_that_was_never_set_is_none(tmp_path) -> None:
    name = "compressed-pack-4"
    stored = load_file(FIXTURES / name / "stored.safetensors")
    expected = load_file(FIXTURES / name / "expected.safetensors")
    for weight, wanted in expected.items():
        stored[f"{weight}_g_idx"] = torch.full((wanted.shape[1],), -1, dtype=torch.int32)
    save_file(stored, tmp_path / "model.safetensors")
    tensors = read(tmp_path / "model.safetensors", config_of(name))
    for weight, wanted in expected.items():
        assert torch.equal(tensors.tensor(weight), wanted)


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_of_any_bits_come_out_of_a_stream_of_words(bits) -> None:
    codes = torch.randint(0, 1 << bits, (3, 37), generator=torch.Generator().manual_seed(bits))
    assert torch.equal(unpack(stream_of(codes, bits), bits, 37), codes.to(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("width", [15, 16])
def test_every_fp8_code_is_pytorchs_value(dtype, width) -> None:
    codes = torch.arange(240, dtype=torch.uint8).view(-1, width).view(dtype)
    assert torch.equal(fp8(codes).view(torch.int32), codes.float().view(torch.int32))


def stream_of(codes: Tensor, bits: int) -> Tensor:
    """Codes as int32 words, the lowest bit first, by Python's integers."""
    words = -(-codes.shape[1] * bits // 32)
    rows = []
    for row in codes.tolist():
        stream = sum(code << index * bits for index, code in enumerate(row))
        rows.append([stream >> 32 * word & 0xFFFFFFFF for word in range(words)])
    return torch.tensor(rows).to(torch.int32)
