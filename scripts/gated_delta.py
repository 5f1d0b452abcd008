"""Whether 8-bit inputs of a gated-delta block's `out_proj` need scales by group: relative errors.

python scripts/gated_delta.py

A small Qwen3-Next with heads of the released model's width (128) and random weights; outliers are
injected where the input of `linear_attn.out_proj` comes from: in channels of the value projection
(outliers in one head), and in the gated norm's weight, which all heads share (outliers in every
head). That input alone is rounded, then the inputs of every linear of the blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from smoothq.kernels import reference

CHANNELS, FACTOR, GROUP, WIDTH, HEAD = 4, 16.0, 128, 256, 128
CASES = ("no outliers", "outliers in one head", "outliers in every head", "both")


def small_model(seed: int) -> PreTrainedModel:
    """Four blocks, three of them gated-delta, in float32."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        "qwen3_next",
        vocab_size=512,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        mlp_only_layers=[0, 1, 2, 3],  # a router that flips would hide what is measured
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        linear_num_key_heads=4,
        linear_num_value_heads=8,
        linear_key_head_dim=HEAD,
        linear_value_head_dim=HEAD,
        initializer_range=WIDTH**-0.5,
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.eval()
    return model


def inject(model: PreTrainedModel, case: str) -> None:
    """Multiply channels at random places by `FACTOR`, in every gated-delta block."""
    for block in delta_blocks(model):
        mixer: Any = block.linear_attn
        if case in ("outliers in one head", "both"):
            convolution = mixer.conv1d.weight  # its last channels are those of the values
            values = mixer.num_v_heads * HEAD
            convolution.data[-values:][torch.randperm(HEAD)[:CHANNELS]] *= FACTOR
        if case in ("outliers in every head", "both"):
            mixer.norm.weight.data[torch.randperm(HEAD)[:CHANNELS]] *= FACTOR


def delta_blocks(model: PreTrainedModel) -> Iterator[Any]:
    """The blocks with linear attention."""
    decoder: Any = model.get_decoder()
    return (block for block in decoder.layers if hasattr(block, "linear_attn"))


def by_token(x: Tensor) -> Tensor:
    """Rounded to 8 bits, one scale a token."""
    codes, scale, *_ = reference.quantize_per_token(x.flatten(0, -2), 8)
    values: Tensor = codes * scale.view(-1, 1)
    return values.view(x.shape)


def by_group(x: Tensor) -> Tensor:
    """Rounded to 8 bits, a scale for each `GROUP` channels of a token."""
    return by_token(x.unflatten(-1, (-1, GROUP))).flatten(-2)


@contextmanager
def rounded(linears: dict[nn.Module, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """A context in which the inputs of linears are rounded, each by its function."""
    with ExitStack() as hooks:
        for linear, function in linears.items():
            hooks.enter_context(
                linear.register_forward_pre_hook(lambda _, args, f=function: (f(args[0]),))
            )
        yield


def errors(model: PreTrainedModel, tokens: Tensor) -> Iterator[float]:
    """The logits' relative error: `out_proj` alone by token and by group, then all linears."""
    ends = [block.linear_attn.out_proj for block in delta_blocks(model)]
    decoder: Any = model.get_decoder()
    linears = [module for module in decoder.layers.modules() if isinstance(module, nn.Linear)]
    before = model(tokens).logits
    for others in ([], linears):
        for function in (by_token, by_group):
            with rounded(dict.fromkeys(others, by_token) | dict.fromkeys(ends, function)):
                yield float((model(tokens).logits - before).norm() / before.norm())


@torch.no_grad()
def main(seeds: Annotated[int, typer.Option(help="Models to average over.")] = 3) -> None:
    """Print a row for each kind of outliers: the mean error in percent."""
    print("| outliers | out_proj, token | out_proj, groups | all, token | all, out_proj groups |")
    print("|---|---|---|---|---|")
    for case in CASES:
        rows = []
        for seed in range(seeds):
            model = small_model(seed)
            inject(model, case)
            tokens = torch.randint(512, (4, 128), generator=torch.Generator().manual_seed(seed))
            rows.append(list(errors(model, tokens)))
        means = torch.tensor(rows).mean(0).tolist()
        print(f"| {case} | " + " | ".join(f"{mean:.2%}" for mean in means) + " |", flush=True)


if __name__ == "__main__":
    typer.run(main)
