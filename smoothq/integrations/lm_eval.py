"""The lm-eval model `smoothq`.

`integrations.register` registers the name without importing this module, which lm-eval imports when
the model is first used.
"""

import logging
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from ..errors import CheckpointError
from ..evaluation.load import load_model

log = logging.getLogger("smoothq")

_DTYPES = ("auto", "float32", "bfloat16", "float16")
_MEMORY = ("fast", "low")
# Arguments of lm-eval's `hf` that apply to a model that is loaded already; it ignores all others.
_SETTINGS = {
    "add_bos_token",
    "batch_size",
    "chat_template_args",
    "enable_thinking",
    "logits_cache",
    "max_batch_size",
    "max_length",
    "mixed_precision_dtype",
    "prefix_token_id",
    "softmax_dtype",
    "think_end_token",
    "truncation",
}


@register_model("smoothq")
class SmoothqLM(HFLM):  # type: ignore[misc]
    """A float or quantized causal LM, loaded as `smoothq eval` loads it.

    Args:
        pretrained: a directory or a hub id.
        dtype: as for `load_model`.
        device: `cuda` falls back to the CPU, with a warning, where PyTorch sees no GPU.
        memory: as for `load_model`.
        settings: model_args of lm-eval's `hf` that do not concern loading.

    Raises:
        CheckpointError: for unknown arguments, and for a model that cannot be loaded.
        DeviceError: for a device that smoothq has no kernels for.
    """

    def __init__(
        self,
        pretrained: str,
        dtype: str | torch.dtype = "auto",
        device: str = "cuda",
        memory: str = "fast",
        **settings: Any,
    ) -> None:
        unknown = sorted(set(settings) - _SETTINGS)
        if unknown:
            known = ", ".join(["pretrained", "dtype", "device", "memory", *sorted(_SETTINGS)])
            raise CheckpointError(f"lm-eval's model smoothq has no {unknown[0]}; it has {known}")
        name = str(dtype).removeprefix("torch.")
        for field, value, values in (("dtype", name, _DTYPES), ("memory", memory, _MEMORY)):
            if value not in values:
                raise CheckpointError(
                    f"lm-eval's model smoothq has no {field} '{value}'; give {', '.join(values)}"
                )
        if device.startswith("cuda") and not torch.cuda.is_available():
            # As `hf` does: lm-eval's command line passes cuda:0 by default.
            log.warning("PyTorch sees no GPU here: running on the CPU instead of '%s'", device)
            device = "cpu"
        model, tokenizer = load_model(pretrained, name, device, memory)
        super().__init__(model, tokenizer=tokenizer, **settings)
