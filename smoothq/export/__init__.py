"""Export of a smoothq checkpoint to compressed-tensors or GGUF."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from ..checkpoint.writer import CheckpointWriter
from ..errors import needs_package
from ..moved import names_of
from ..progress import Progress
from ..report.results import ExportResult
from .compressed_tensors import export_compressed_tensors

Form = Literal["compressed-tensors", "gguf"]


def export_checkpoint(
    directory: str | Path,
    output: str | Path,
    form: Form = "compressed-tensors",
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
    trust_remote_code: bool = False,
) -> ExportResult:
    """Export a quantized checkpoint to a format that other libraries read.

    Args:
        directory: of a checkpoint that smoothq wrote.
        output: a directory, or for `gguf` a file.
        form: `compressed-tensors`, a directory for transformers and vLLM, or `gguf`, a file for
            llama.cpp.
        overwrite: whether to replace an existing output.
        progress: called at each block.
        trust_remote_code: whether to run code beside the model; a model with code of its own has no
            GGUF.

    Raises:
        SmoothqError: as `export_compressed_tensors` and `export_gguf` do.
    """
    if form == "gguf":
        needs_package("gguf", "gguf")
        from .gguf import export_gguf

        return export_gguf(Path(directory), Path(output), overwrite, progress)
    writer = CheckpointWriter(Path(output), overwrite, resume=False)
    return export_compressed_tensors(Path(directory), writer, progress, trust_remote_code)


class _Callable(ModuleType):
    """Makes this module callable: `smoothq.export(...)` is the old name of `export_checkpoint`."""

    def __call__(self, *args: Any, **kwargs: Any) -> ExportResult:
        return export_checkpoint(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
export = export_checkpoint
__getattr__ = names_of(__name__, "export.compressed_tensors", "report.results")
