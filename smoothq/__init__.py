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
    from .architectures import BlockGraph as BlockGraph
    from .architectures import Family as Family
    from .architectures import Norm as Norm
    from .architectures import register_family as register_family
    from .architectures.parts import gated_mlp as gated_mlp
    from .architectures.parts import separate_attention as separate_attention
    from .architectures.parts import writers as writers
    from .checkpoint.open import open_source as open_source
    from .data.text import TextSource as TextSource
    from .data.text import calibration_tokens as calibration_tokens
    from .data.text import evaluation_tokens as evaluation_tokens
    from .discovery.infer import prove_family as prove_family
    from .errors import SmoothqError as SmoothqError
    from .evaluation.evaluate import Evaluation as Evaluation
    from .evaluation.evaluate import evaluate as evaluate
    from .evaluation.perplexity import Perplexity as Perplexity
    from .evaluation.perplexity import perplexity as perplexity
    from .export import export_checkpoint as export_checkpoint
    from .hub import push_to_hub as push_to_hub
    from .inspection.outliers import METHODS as METHODS
    from .inspection.outliers import inspect_model as inspect_model
    from .inspection.page import write_page as write_page
    from .inspection.plots import figures as figures
    from .inspection.summary import massive_tokens as massive_tokens
    from .modules.prepare import keep_packed as keep_packed
    from .pipeline.monitor import BlockDone as BlockDone
    from .pipeline.monitor import Probe as Probe
    from .plan.config import SmoothqConfig as SmoothqConfig
    from .recipe.presets import preset as preset
    from .recipe.recipe import Recipe as Recipe
    from .recipe.recipe import load_recipe as load_recipe
    from .report.quantize_result import QuantizeResult as QuantizeResult
    from .report.results import ExportResult as ExportResult

_HOMES = {
    "BlockDone": "pipeline.monitor",
    "BlockGraph": "architectures",
    "Evaluation": "evaluation.evaluate",
    "ExportResult": "report.results",
    "Family": "architectures",
    "METHODS": "inspection.outliers",
    "Norm": "architectures",
    "Perplexity": "evaluation.perplexity",
    "Probe": "pipeline.monitor",
    "QuantizeResult": "report.quantize_result",
    "Recipe": "recipe.recipe",
    "SmoothqConfig": "plan.config",
    "SmoothqError": "errors",
    "TextSource": "data.text",
    "calibration_tokens": "data.text",
    "evaluate": "evaluation.evaluate",
    "evaluation_tokens": "data.text",
    "export_checkpoint": "export",
    "figures": "inspection.plots",
    "gated_mlp": "architectures.parts",
    "inspect_model": "inspection.outliers",
    "keep_packed": "modules.prepare",
    "load_recipe": "recipe.recipe",
    "massive_tokens": "inspection.summary",
    "open_source": "checkpoint.open",
    "perplexity": "evaluation.perplexity",
    "preset": "recipe.presets",
    "prove_family": "discovery.infer",
    "push_to_hub": "hub",
    "quantize": "api",
    "register_family": "architectures",
    "separate_attention": "architectures.parts",
    "write_page": "inspection.page",
    "writers": "architectures.parts",
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
