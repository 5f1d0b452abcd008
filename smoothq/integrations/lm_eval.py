"""The model `smoothq` of lm-eval.

lm-eval imports this file when it is first asked for that model; the name itself is registered by
`integrations.register`, which needs nothing of lm-eval that is slow to import.
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
# What lm-eval's own `hf` heeds of a model that is loaded already; the rest it would drop.
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

    pretrained: a directory or a hub id. dtype and memory: as for `load_model`. device: a GPU where
    there is one. settings: model_args of lm-eval's own `hf` that are not about loading.
    Raises CheckpointError for other arguments and for what cannot be loaded, DeviceError for the
    device.
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
            # As `hf` does: lm-eval's command line asks for cuda:0 where nobody names a device.
            log.warning("PyTorch sees no GPU here: running on the CPU instead of '%s'", device)
            device = "cpu"
        model, tokenizer = load_model(pretrained, name, device, memory)
        super().__init__(model, tokenizer=tokenizer, **settings)
