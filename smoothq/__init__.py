"""smoothq: post-training quantization of LLMs, with real integer kernels.

Importing it registers the checkpoint format with transformers:
`AutoModelForCausalLM.from_pretrained(OUT)` then loads what `quantize` wrote.
"""

from .api import quantize
from .evaluation.perplexity import Perplexity, perplexity
from .integrations.transformers import keep_packed
from .recipe import Recipe, load_recipe, preset
from .version import __version__

__all__ = [
    "Perplexity",
    "Recipe",
    "__version__",
    "keep_packed",
    "load_recipe",
    "perplexity",
    "preset",
    "quantize",
]
