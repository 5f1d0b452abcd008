"""What quantizing a mixture takes does not grow with its layers or its experts."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import Qwen3MoeConfig

# The experts of one block in float32 are 100 MB of 32, and 200 MB of 64.
RUN = """
import sys
from smoothq import preset, quantize
from smoothq.checkpoint.open import open_source
from smoothq.pipeline.estimate import estimate_resources
from smoothq.plan.resolve import make_plan

recipe = preset("w8a8", "rtn")
estimated = estimate_resources(make_plan(open_source(sys.argv[1]).skeleton(), recipe)).memory
print(quantize(sys.argv[1], recipe, output=sys.argv[2]).peak_memory, estimated)
"""


def peak(folder: Path, layers: int, experts: int, monkeypatch) -> tuple[int, int]:
    """Bytes that quantizing a random mixture takes, in a process of its own, and the estimate."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "scripts"))
    from make_random_model import write_random_model

    config = Qwen3MoeConfig(
        vocab_size=1000,
        hidden_size=1024,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=64,
        num_experts=experts,
        num_experts_per_tok=8,
        moe_intermediate_size=256,
        dtype=torch.bfloat16,
    )
    model = folder / f"{layers} {experts}"
    folder.mkdir(exist_ok=True)
    write_random_model(model, config)
    command = [sys.executable, "-c", RUN, str(model), str(folder / f"out {layers} {experts}")]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    taken, estimated = done.stdout.split()[-2:]
    return int(taken), int(estimated)


@pytest.mark.slow
def test_twice_the_layers_or_experts_take_less_than_a_block_in_memory_would(
    tmp_path, monkeypatch
) -> None:
    # The least of two runs: one takes up to 40 MB more than another of the same model.
    measured = [
        min(peak(tmp_path / str(run), layers, experts, monkeypatch) for run in range(2))
        for layers, experts in ((2, 32), (2, 64), (4, 32))
    ]
    peaks = [taken for taken, _ in measured]
    assert max(peaks) - min(peaks) < 80e6, peaks
    for taken, estimated in measured:
        assert taken == pytest.approx(estimated, rel=0.3)
