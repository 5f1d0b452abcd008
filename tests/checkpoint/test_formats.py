"""Models that are quantized already are read as what their writers decode their weights to.

The fixtures are by the writers themselves: see scripts/make_quantized_fixtures.py.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig

from smoothq.checkpoint.formats.choose import as_float
from smoothq.checkpoint.formats.decoded import DecodedTensors
from smoothq.checkpoint.stored import WeightFiles

FIXTURES = Path(__file__).parents[1] / "fixtures" / "quantized"
NAMES = sorted(path.name for path in FIXTURES.iterdir())


def decoded(name: str) -> DecodedTensors:
    """The stored tensors of a fixture, decoded to bfloat16."""
    path = FIXTURES / name / "stored.safetensors"
    quantization = json.loads((FIXTURES / name / "quantization_config.json").read_text())
    _, format = as_float(LlamaConfig(dtype="bfloat16", quantization_config=quantization), name)
    assert format is not None
    return DecodedTensors(WeightFiles(dict.fromkeys(load_file(path), path)), format, name)


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
