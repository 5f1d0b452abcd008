"""What a quantization came to, and the model that it wrote."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..checkpoint.loading import load_as_stored
from ..modules.prepare import keep_packed
from ..plan.plan import Bits
from ..recipe.recipe import Recipe
from .figures import outcome_as_dict, remarks, size_rows
from .results import ExportResult, duration_text
from .table import as_text, pairs


@dataclass(frozen=True, repr=False)
class QuantizeResult:
    """What a quantization came to; its `repr` is the closing table. `load()` loads the model.

    Attributes:
        name: the float model.
        recipe: as it was run, with what the model's own code asks for added to `keep`.
        bits: an element, averaged over all linears.
        bytes_before: of all tensors of the float model.
        bytes_after: of all tensors of the quantized one.
        linear_bytes: of the quantized weights with their scales.
        seconds: that the run took.
        peak_memory: bytes of the whole process, libraries included.
        notes: what the user should know.
        repeated: the output was there, whole and of the same run, and nothing was done.
        path: the directory that transformers loads.
        export: what the export came to, where another format was asked for.
    """

    name: str
    recipe: Recipe
    bits: Bits
    bytes_before: int
    bytes_after: int
    linear_bytes: int
    seconds: float
    peak_memory: int
    notes: tuple[str, ...]
    repeated: bool = False
    path: Path | None = None
    export: ExportResult | None = None
    _dtype: torch.dtype | str = field(default="auto", compare=False)
    _memory: str = field(default="fast", compare=False)
    _trusts_code: bool = field(default=False, compare=False)
    _model: list[PreTrainedModel] = field(default_factory=list, compare=False)

    def load(
        self,
        *,
        device: str | None = None,
        dtype: torch.dtype | str | None = None,
        memory: str | None = None,
    ) -> PreTrainedModel:
        """The quantized model, loaded from `path`.

        Args:
            device: to run on; without it the CPU.
            dtype: of all that is not quantized; without it what `quantize` was given.
            memory: `fast` holds 4-bit weights also as int8 where that is faster, `low` packed
                alone; without it what `quantize` was given.
        """
        assert self.path is not None
        dtype = self._dtype if dtype is None else dtype
        model: Any = load_as_stored(self.path, str(self.path), dtype, self._trusts_code)
        if (memory or self._memory) == "low":
            keep_packed(model)
        return model if device is None else model.to(device)  # type: ignore[no-any-return]

    def rows(self) -> list[tuple[str, str]]:
        """The closing table: label and value."""
        return [
            *size_rows(self.recipe, self.bits, self.bytes_before, self.bytes_after),
            ("time", duration_text(self.seconds)),
            ("peak memory, libraries included", f"{self.peak_memory / 1e9:.2f} GB"),
        ]

    def as_dict(self) -> dict[str, Any]:
        """The closing figures as plain data, as `smoothq quantize --json` prints them."""
        return outcome_as_dict(self, self.name, self.bytes_before, self.bytes_after) | {
            "seconds": round(self.seconds, 1),
            "peak_memory_bytes": self.peak_memory,
            "repeated": self.repeated,
        }

    def __repr__(self) -> str:
        table = as_text(pairs(f"{self.name} → {self.path}", self.rows()))
        return "\n".join([table, *remarks(self, self.name)])

    # Until version 0.3 `quantize(..., output=...)` returned the loaded model: what it has is handed
    # on to it.

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._as_model(f".{name}"), name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the loaded model."""
        return self._as_model("()")(*args, **kwargs)

    def _as_model(self, use: str) -> PreTrainedModel:
        warnings.warn(
            f"quantize(..., output=...) returns a QuantizeResult: write result.load(){use}",
            DeprecationWarning,
            stacklevel=3,
        )
        if not self._model:
            self._model.append(self.load())
        return self._model[0]
