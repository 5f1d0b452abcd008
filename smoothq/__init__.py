"""smoothq: post-training quantization of LLMs, with real integer kernels.

Importing it registers the checkpoint format with transformers:
`AutoModelForCausalLM.from_pretrained(OUT)` then loads what `quantize` wrote. Where lm-eval is
installed it learns the model `smoothq` too.
"""

import sys
from types import ModuleType
from typing import Any

from .api import quantize
from .evaluation.evaluate import Evaluation, evaluate
from .evaluation.harness import register
from .evaluation.perplexity import Perplexity, perplexity
from .export import Exported
from .export import export as export_checkpoint
from .hub import push_to_hub
from .integrations.transformers import keep_packed
from .probe import BlockDone, Probe
from .recipe import Recipe, load_recipe, preset
from .version import __version__

__all__ = [
    "BlockDone",
    "Evaluation",
    "Exported",
    "Perplexity",
    "Probe",
    "Recipe",
    "__version__",
    "evaluate",
    "export",
    "export_checkpoint",
    "keep_packed",
    "load_recipe",
    "perplexity",
    "preset",
    "push_to_hub",
    "quantize",
]


class _CallableModule(ModuleType):
    """A module that is also called like its function of the same name.

    `smoothq.export` is the module; `from smoothq import export` has always been called.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return export_checkpoint(*args, **kwargs)


export = sys.modules[f"{__name__}.export"]
export.__class__ = _CallableModule
register()
