"""smoothq: post-training quantization of LLMs, with real integer kernels.

Importing it registers the checkpoint format with transformers:
`AutoModelForCausalLM.from_pretrained(OUT)` then loads what `quantize` wrote. Where lm-eval is
installed it learns the model `smoothq` too.
"""

from .api import quantize
from .evaluation.evaluate import Evaluation, evaluate
from .evaluation.harness import register
from .evaluation.perplexity import Perplexity, perplexity
from .export import Exported, export
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
    "keep_packed",
    "load_recipe",
    "perplexity",
    "preset",
    "push_to_hub",
    "quantize",
]

register()
