"""Names of an earlier version: for one version they lead, with a warning, to what they are now."""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from operator import attrgetter
from types import ModuleType
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

# Modules that are no more → where what they held is now.
MODULES: dict[str, tuple[str, ...]] = {
    "account": ("plan.account",),
    "attention_plan": ("plan.attention",),
    "calibration": ("data.text",),
    "calibration_data": ("data.calibration",),
    "checkpoint.compressed_tensors": ("export.schemes",),
    "checkpoint.gguf": ("export.gguf_tensors", "export.gguf_tokenizer"),
    "checkpoint.packing": ("rounding.packing",),
    "checkpoint.stream": (
        *("checkpoint.weight_files", "checkpoint.hub_files", "checkpoint.model_config"),
        *("checkpoint.skeleton", "checkpoint.source", "checkpoint.checkpoint_source"),
        *("checkpoint.module_source", "checkpoint.open"),
    ),
    "checkpoint.tokenizer": ("data.tokenizer",),
    "architectures.attention": ("architectures.attention_support",),
    "architectures.layout": ("architectures.linearize",),
    "distributed": ("runtime.distributed",),
    "evaluation.agreement": ("evaluation.divergence",),
    "evaluation.harness": ("evaluation.tasks",),
    "evaluation.loading": ("evaluation.load",),
    "experiments": ("discovery.experiments",),
    "export_gguf": ("export.gguf", "export.gguf_metadata"),
    "families": ("advisor.families",),
    "flags": ("cli.recipe_flags",),
    "float_parts": ("pipeline.ends",),
    "folded": ("export.reader",),
    "hidden_states": ("pipeline.hidden_states",),
    "inference": ("discovery.infer",),
    "memory": ("runtime.memory",),
    "migration": ("pipeline.alpha_search",),
    "observers": ("pipeline.observers",),
    "outlook": ("advisor.chips", "advisor.runners", "advisor.costs"),
    "output": ("pipeline.shared_writer",),
    "positions": ("architectures.positions",),
    "price": ("pipeline.estimate", "report.results"),
    "probe": ("pipeline.monitor",),
    "process": ("runtime.process",),
    "proof": ("discovery.equivalence",),
    "roundtrip": ("pipeline.round_trip",),
    "servable": ("plan.portability",),
    "served": ("advisor.vllm_kernels",),
    "terminal": ("cli.terminal", "report.table"),
    "tokens": ("data.tokens",),
    "transforms.stretches": ("transforms.chunks",),
    "tuning": ("pipeline.block_tuning",),
    "weight_reads": ("discovery.weight_reads",),
    "weight_watch": ("discovery.weight_watch",),
} | {
    f"architectures.{family}": (f"architectures.families.{family}",)
    for family in (
        *("bloom", "cohere", "falcon", "gemma", "glm", "gpt2", "gpt_neox", "gpt_oss", "llama"),
        *("mixtral", "olmo2", "opt", "phi3", "qwen_moe"),
    )
}
# Their names → what these are called now.
NAMES = {
    "Checked": "VerifyResult",
    "Contender": "ModelMeasurement",
    "Exported": "ExportResult",
    "FoldedCheckpoint": "ExportReader",
    "Identity": "RunKey",
    "ModelEnd": "ModelTail",
    "Needs": "ResourceEstimate",
    "Obstacle": "ExportBlocker",
    "Outlook": "PlanAdvice",
    "Output": "SharedWriter",
    "Price": "TimeEstimate",
    "Probing": "PerplexityMonitor",
    "Result": "QuantizeResult",
    "Served": "LayerKernel",
    "Surroundings": "Environment",
    "Unit": "SiteSensitivity",
    "as_text": "duration_text",
    "building": "build_lock",
    "close_block": "restore_block",
    "infer_family": "discover_family",
    "needs_of": "estimate_resources",
    "obstacles": "export_blockers",
    "open_block": "linearize_block",
    "outlook": "advise",
    "price": "estimate_time",
    "refuse_obstacles": "refuse_blockers",
    "servable": "make_exportable",
    "served": "layer_kernels",
    "settled": "default_modes",
    "skeleton": "Source.skeleton",
}
# Words for what a Site reads → what they are now.
READS = {"stream": "residual", "values": "attention", "inner": "mlp"}
_PACKAGE = __name__.rpartition(".")[0]


def names_of(module: str, *homes: str) -> Callable[[str], Any]:
    """A `__getattr__` for a module that held what its homes hold now.

    Args:
        module: its full name.
        homes: modules below this package, in the order in which they are asked.
    """

    def moved(name: str) -> Any:
        for home in () if name.startswith("__") else homes:
            source = import_module(f"{_PACKAGE}.{home}")
            current = name if hasattr(source, name) else NAMES.get(name, name)
            with suppress(AttributeError):
                value = attrgetter(current)(source)
                message = f"{module}.{name} is now {_PACKAGE}.{home}.{current}"
                warnings.warn(message, DeprecationWarning, stacklevel=3)
                return value
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return moved


def also_named(old: str, method: Callable[P, T]) -> Callable[P, T]:
    """The method under its earlier name, which warns.

    Args:
        old: the name that the result is assigned to.
        method: what it is called now.
    """

    @functools.wraps(method)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        message = f"{method.__qualname__.rpartition('.')[0]}.{old} is now {method.__qualname__}"
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        return method(*args, **kwargs)

    return call


class _Finder(MetaPathFinder, Loader):
    """Finds a module under its earlier name, after everything else has failed to."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, name = fullname.partition(".")
        known = package == _PACKAGE and name in MODULES
        return ModuleSpec(fullname, self) if known else None

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        homes = MODULES[module.__name__.partition(".")[2]]
        vars(module)["__getattr__"] = names_of(module.__name__, *homes)


def install() -> None:
    """Let modules be imported under their earlier names."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
