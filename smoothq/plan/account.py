"""The account of a checkpoint: every tensor that it will hold, and whether its files do.

It is drawn up from the plan before the first block: what a quantized model needs when it is loaded,
each float in the dtype that it came in, and what of the source the model's class does not know.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from ..checkpoint.source import Source, Spec, tensor_shapes
from ..errors import OutputError
from ..modules import InputQuantizer, QuantizedEmbedding, QuantizedLinear
from .install import install
from .plan import Plan
from .resolve import stored_tensors

Account = dict[str, Spec]


def account_of(model: PreTrainedModel, plan: Plan, source: Source) -> Account:
    """What a plan's checkpoint holds by name. model: the skeleton of the source, left as it is."""
    quantized = copy.deepcopy(model)
    install(quantized, plan)
    codes = codes_of(quantized)

    def dtype(name: str, tensor: torch.Tensor) -> torch.dtype:
        cast = plan.recipe.dtype != "auto" and tensor.is_floating_point() and name not in codes
        return plan.stored_dtype if cast else tensor.dtype

    tensors = stored_tensors(quantized)
    held = {name: Spec(tuple(t.shape), dtype(name, t)) for name, t in tensors.items()}
    return held | source.extras


def codes_of(model: nn.Module) -> set[str]:
    """The names of a quantized model's codes, scales and multipliers."""
    return {
        f"{name}.{key}"
        for name, module in model.named_modules()
        if isinstance(module, QuantizedLinear | InputQuantizer | QuantizedEmbedding)
        for key, _ in module.named_buffers(recurse=False)
        if key != "bias"
    }


def nbytes_of(account: Account) -> int:
    """Bytes of all tensors of an account."""
    return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in account.values())


def check_files(account: Account, directory: Path) -> None:
    """Raise OutputError unless the files of a directory hold what an account says."""
    found: Account = {}
    for path in sorted(directory.glob("*.safetensors")):
        found |= tensor_shapes(path)
    wrong = sorted(name for name in account | found if account.get(name) != found.get(name))
    if wrong:
        name = wrong[0]
        raise OutputError(
            f"{len(wrong)} tensors of the output are not what was planned, the first '{name}': "
            f"planned {_text(account.get(name))}, written {_text(found.get(name))}; nothing was "
            "placed: please report this"
        )


def _text(spec: Spec | None) -> str:
    return "none" if spec is None else f"{spec.dtype} {spec.shape}"
