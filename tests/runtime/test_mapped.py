"""Mapped tensors keep their values, whatever of them is in memory."""

from pathlib import Path

import pytest
import torch

from smoothq import preset, quantize
from smoothq.checkpoint.open import open_source
from smoothq.runtime import mapped as memory
from smoothq.runtime.mapped import is_mapped, mapped, mapped_tensor, touch
from smoothq.verify import verify_checkpoint
from tests.tiny_models import tiny_model


def resident() -> int:
    """Bytes of files that are mapped into this process and in memory."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssFile"))


def test_a_part_that_was_given_up_is_read_as_it_was_written(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "RESIDENT_BYTES", 4096)
    stack = mapped_tensor((64, 16, 33), torch.float32, tmp_path)
    values = torch.randn(stack.shape)
    for part, matrix in zip(stack, values, strict=True):
        touch(part)
        part.copy_(matrix)
    for part, matrix in zip(stack, values, strict=True):
        touch(part.t())
        assert torch.equal(part, matrix)
    assert not list(tmp_path.iterdir())


def test_only_what_was_touched_last_is_in_memory(tmp_path: Path) -> None:
    before = resident()
    stack = mapped_tensor((32, 1 << 20), torch.float32, tmp_path)
    for part in stack:
        touch(part)
        part.fill_(1.0)
    assert resident() - before < 2 * memory.RESIDENT_BYTES < stack.nbytes
    assert float(stack[0, 0]) == 1.0


def test_other_tensors_are_let_alone(tmp_path: Path) -> None:
    plain = torch.ones(3)
    touch(plain)
    assert not is_mapped(plain)
    copied = mapped(plain, tmp_path)
    assert is_mapped(copied)
    assert is_mapped(copied[1:])
    assert torch.equal(copied, plain)


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_a_stack_of_experts_is_read_expert_by_expert(name, tmp_path) -> None:
    tiny_model(name, torch.float32).save_pretrained(tmp_path)
    source = open_source(tmp_path)
    stacks = [full for full, spec in source.specs.items() if len(spec.shape) == 3]
    assert stacks
    for full, tensor in source.tensors(stacks):
        rows = list(source.rows(full, 1))
        assert all(len(part) == 1 for part in rows)
        assert torch.equal(torch.cat(rows), tensor)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["rtn", "quarot"])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_a_mixture_is_quantized_to_the_same_bytes(
    name, recipe, monkeypatch, tmp_path, data
) -> None:
    tiny_model(name, torch.float32).save_pretrained(tmp_path / "float")
    chosen = preset("w4a4", recipe)
    quantize(tmp_path / "float", chosen, data=data, output=tmp_path / "in memory")
    monkeypatch.setattr("smoothq.checkpoint.source.STACK_BYTES", 1)
    monkeypatch.setattr("smoothq.pipeline.round_trip.SMALL_BYTES", 0)
    monkeypatch.setattr("smoothq.pipeline.round_trip.spare_memory", lambda: 0)
    quantize(tmp_path / "float", chosen, data=data, output=tmp_path / "mapped")
    verify_checkpoint(tmp_path / "mapped")
    files = sorted(path.name for path in (tmp_path / "mapped").glob("*.safetensors"))
    assert files
    for file in files:
        one, other = (tmp_path / folder / file for folder in ("in memory", "mapped"))
        assert one.read_bytes() == other.read_bytes()
