"""smoothq: post-training quantization of LLMs, with real integer kernels.

Importing it has transformers register the checkpoint format, before or after transformers is
imported: `AutoModelForCausalLM.from_pretrained(OUT)` then loads what `quantize` wrote. lm-eval
learns the model `smoothq` in the same way. Neither is imported for it, and every public name is
imported when it is first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any
from warnings import warn

from . import moved
from .integrations.register import register
from .version import __version__ as __version__

if TYPE_CHECKING:
    from . import export as export
    from . import kernels as kernels
    from .api import quantize as quantize
    from .evaluation.evaluate import Evaluation as Evaluation
    from .evaluation.evaluate import evaluate as evaluate
    from .evaluation.perplexity import Perplexity as Perplexity
    from .evaluation.perplexity import perplexity as perplexity
    from .export import export_checkpoint as export_checkpoint
    from .hub import push_to_hub as push_to_hub
    from .modules.prepare import keep_packed as keep_packed
    from .pipeline.monitor import BlockDone as BlockDone
    from .pipeline.monitor import Probe as Probe
    from .recipe.presets import preset as preset
    from .recipe.recipe import Recipe as Recipe
    from .recipe.recipe import load_recipe as load_recipe
    from .report.results import ExportResult as ExportResult

_HOMES = {
    "BlockDone": "pipeline.monitor",
    "Evaluation": "evaluation.evaluate",
    "ExportResult": "report.results",
    "Perplexity": "evaluation.perplexity",
    "Probe": "pipeline.monitor",
    "Recipe": "recipe.recipe",
    "evaluate": "evaluation.evaluate",
    "export_checkpoint": "export",
    "keep_packed": "modules.prepare",
    "load_recipe": "recipe.recipe",
    "perplexity": "evaluation.perplexity",
    "preset": "recipe.presets",
    "push_to_hub": "hub",
    "quantize": "api",
}
__all__ = [*sorted([*_HOMES, "__version__", "export"])]


def __getattr__(name: str) -> Any:
    current = name if name in _HOMES else moved.NAMES.get(name)
    if current in _HOMES:
        if current != name:
            warn(f"smoothq.{name} is now smoothq.{current}", DeprecationWarning, stacklevel=2)
        return getattr(import_module(f".{_HOMES[current]}", __name__), current)
    if name == "export":
        return import_module(".export", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__


moved.install()
register()
