"""Export to a GGUF file for llama.cpp, which keeps the codes unchanged."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from torch import Tensor

from ..checkpoint.checkpoint_source import CheckpointSource
from ..checkpoint.manifest import MANIFEST, sha256_of
from ..checkpoint.placing import is_mounted
from ..checkpoint.tensor_file import as_bytes
from ..errors import CheckpointError, OutputError, RecipeError, UnsupportedModelError
from ..modules import WeightSpec
from ..progress import Progress
from ..report.results import ExportResult
from ..version import __version__
from .gguf_metadata import FAMILIES, describe, rope_factors
from .gguf_tensors import BLOCK, TYPES, block_bytes, blocks, lost_scales, paired_rows, with_rows
from .gguf_tokenizer import describe_tokenizer
from .reader import ExportReader

FORMAT = "GGUF"
MADE_FROM = "smoothq.made_from"  # metadata key: manifest hash and smoothq version
FILE_TYPES = {
    GGMLQuantizationType.Q4_0: gguf.LlamaFileType.MOSTLY_Q4_0,
    GGMLQuantizationType.Q4_1: gguf.LlamaFileType.MOSTLY_Q4_1,
    GGMLQuantizationType.Q8_0: gguf.LlamaFileType.MOSTLY_Q8_0,
}
FLOATS = {
    torch.float32: GGMLQuantizationType.F32,
    torch.float16: GGMLQuantizationType.F16,
    torch.bfloat16: GGMLQuantizationType.BF16,
}
ROPE_FREQS = "rope_freqs.weight"


@dataclass(frozen=True)
class _Info:
    """An entry in the file's tensor table. nbytes: of the data in the form `kind`."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    nbytes: int


def export_gguf(
    directory: Path, output: Path, overwrite: bool = False, progress: Progress | None = None
) -> ExportResult:
    """Write a smoothq checkpoint as a GGUF file.

    8-bit linears become Q8_0, 4-bit ones Q4_0, or Q4_1 with zero points. Codes are kept, scales are
    rounded to float16. Float matrices, such as embedding and head, keep their dtype; vectors become
    float32. The recipe's quantization of activations is lost: llama.cpp quantizes them to 8 bits in
    blocks of 32. llama.cpp has no sliding window for these models, so a window limits the context
    length.

    Args:
        directory: of a checkpoint that smoothq wrote.
        output: the file.
        overwrite: whether to replace an existing file.
        progress: called at each block.

    Raises:
        CheckpointError: for a directory that is no smoothq checkpoint, or an output that cannot be
            used.
        RecipeError: for linears that no GGUF block type can hold.
        UnsupportedModelError: for an architecture or tokenizer that llama.cpp does not have.
        OutputError: if the disk refuses.
    """
    start = time.perf_counter()
    _refuse_output(output)
    folded = ExportReader(directory, FORMAT)
    _refuse_source(output, folded.source)
    names = _Names(folded)
    infos = list(_infos(folded, names))
    kinds = Counter(_kind(name, spec) for name, spec in folded.specs.items())
    exported = ExportResult(
        folded.source.nbytes,
        sum(info.nbytes for info in infos),
        folded.added_bytes,
        {kind.name: count for kind, count in kinds.items()},
        0.0,
        repeated=True,
    )
    made_from = _made_from(directory)
    if output.exists() and not overwrite:
        if made_from is not None and made_from == _said_in(output):
            return exported
        raise CheckpointError(f"output '{output}' exists; overwrite=True replaces it")
    partial = _partial(output)
    writer = GGUFWriter(partial, gguf.MODEL_ARCH_NAMES[names.family.arch])
    describe(writer, folded, names.family)
    describe_tokenizer(writer, folded.source)
    if made_from is not None:
        writer.add_string(MADE_FROM, made_from)
    writer.add_file_type(FILE_TYPES[kinds.most_common(1)[0][0]])
    for info in infos:
        writer.add_tensor_info(
            info.name, info.shape, np.dtype(np.float32), info.nbytes, raw_dtype=info.kind
        )
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        assert writer.fout is not None
        (file,) = writer.fout
        for info, rows in zip(infos, _data(folded, names, progress), strict=True):
            _append(file, info, rows, writer.data_alignment)
        file.flush()
        os.fsync(file.fileno())
        writer.close()
        os.replace(partial, output)
    except OSError as error:
        raise OutputError(f"cannot write '{output}': {error}") from error
    finally:
        writer.close()
        if partial.exists():
            partial.unlink()
    return replace(exported, seconds=time.perf_counter() - start, repeated=False)


def _refuse_output(output: Path) -> None:
    if output.is_dir():
        raise CheckpointError(f"output '{output}' is a directory; give a file, such as MODEL.gguf")
    if output.exists() and is_mounted(output):
        raise CheckpointError(f"output '{output}' is mounted, and cannot be replaced; give another")


def _refuse_source(output: Path, source: CheckpointSource) -> None:
    """Raise CheckpointError where writing would replace a file of the checkpoint."""
    partial = _partial(output)
    for path in source.directory.iterdir():
        for written in (output, partial):
            if written.exists() and path.suffix != ".gguf" and os.path.samefile(written, path):
                raise CheckpointError(
                    f"output '{written}' is a file of the checkpoint itself; give another output"
                )


def _partial(output: Path) -> Path:
    return output.with_name(f"{output.name}.partial")


def _made_from(directory: Path) -> str | None:
    """Manifest hash and smoothq version, for `MADE_FROM`; None without a manifest."""
    manifest = directory / MANIFEST
    return f"{sha256_of(manifest)} {__version__}" if manifest.is_file() else None


def _said_in(output: Path) -> str | None:
    """The value of `MADE_FROM` in a GGUF file; None if that is missing or unreadable."""
    try:
        field = GGUFReader(output).get_field(MADE_FROM)
    except Exception:  # the library has no common base for damaged files
        return None
    return None if field is None else str(field.contents())


class _Names:
    """llama.cpp's names of a model's tensors, and the order of their rows."""

    def __init__(self, folded: ExportReader) -> None:
        """Raises UnsupportedModelError for an architecture that llama.cpp lacks or differs in."""
        config = folded.source.config
        self._model, self._config = folded.name, config
        if config.model_type not in FAMILIES:
            raise UnsupportedModelError(
                f"{folded.name}: no GGUF is written of model_type '{config.model_type}', only of "
                f"{', '.join(FAMILIES)}; export it in another format"
            )
        self.family = FAMILIES[config.model_type]
        if config.hidden_act != "silu":
            raise UnsupportedModelError(
                f"{folded.name}: its activation is {config.hidden_act}, llama.cpp's is silu"
            )
        self._map = gguf.get_tensor_name_map(self.family.arch, config.num_hidden_layers)

    def renamed(self, tensor: str) -> str:
        """llama.cpp's name of a tensor. Raises UnsupportedModelError if it has none."""
        name = self._map.get_name(tensor, try_suffixes=(".weight", ".bias"))
        owner, _, kind = (name or "").rpartition(".")
        if name is None or (kind == "bias" and owner.split(".")[-1] not in self.family.biases):
            raise UnsupportedModelError(
                f"{self._model}: llama.cpp's {gguf.MODEL_ARCH_NAMES[self.family.arch]} has no "
                f"place for '{tensor}'; export it in another format"
            )
        return name

    def order(self, tensor: str, rows: int) -> Tensor | None:
        """Which row comes where, int64 (rows,), or None where the order is unchanged."""
        heads = {
            "q_proj": self._config.num_attention_heads,
            "k_proj": self._config.num_key_value_heads,
        }
        module = tensor.split(".")[-2]
        if not self.family.pairs or module not in heads:
            return None
        return paired_rows(rows, heads[module])


def _infos(folded: ExportReader, names: _Names) -> Iterator[_Info]:
    """Table entries of all tensors, in the order of `_data`."""
    for name, spec in folded.specs.items():
        kind, shape = _kind(name, spec), (spec.out_features, spec.in_features)
        nbytes = spec.elements // BLOCK * block_bytes(kind)
        yield _Info(names.renamed(f"{name}.weight"), shape, kind, nbytes)
        if getattr(folded.model.get_submodule(name), "bias", None) is not None:
            bias = names.renamed(f"{name}.bias")
            yield _Info(bias, shape[:1], GGMLQuantizationType.F32, 4 * shape[0])
    for tensor in folded.floats():
        vector = len(tensor.shape) == 1
        kind = GGMLQuantizationType.F32 if vector else FLOATS[folded.plan.stored_dtype]
        nbytes = 4 * tensor.shape[0] if vector else tensor.nbytes
        yield _Info(names.renamed(tensor.name), tensor.shape, kind, nbytes)
    factors = rope_factors(folded)
    if factors is not None:
        yield _Info(ROPE_FREQS, tuple(factors.shape), GGMLQuantizationType.F32, factors.nbytes)


def _kind(name: str, spec: WeightSpec) -> GGMLQuantizationType:
    """The GGUF block type of a linear. Raises RecipeError if none can hold it."""
    grid, why = spec.grid, None
    if (grid.bits, grid.symmetric) not in TYPES:
        why = f"no type has {grid.bits} bits and zero points; quantize with 4, or without them"
    elif spec.in_features % BLOCK:
        why = f"its rows of {spec.in_features} are no multiple of {BLOCK}"
    elif spec.groups > 1 and grid.group_size % BLOCK:
        why = f"its groups of {grid.group_size} are no multiple of {BLOCK}; quantize with 32"
    if why is not None:
        raise RecipeError(f"'{name}' has no place in GGUF: {why}, or leave it in float by `keep`")
    return TYPES[grid.bits, grid.symmetric]


def _data(
    folded: ExportReader, names: _Names, progress: Progress | None
) -> Iterator[Iterable[Tensor]]:
    """The data of all tensors as chunks of rows, in the order of `_infos`."""
    for linear in folded.linears(progress):
        order = names.order(f"{linear.name}.weight", linear.spec.out_features)
        weight, bias = linear.weight, linear.bias
        lost = lost_scales(weight)
        if lost:
            raise RecipeError(
                f"'{linear.name}' has no place in GGUF: float16 does not hold {lost} of its "
                "scales; leave it in float by `keep`"
            )
        if order is not None:
            weight = with_rows(weight, order)
            bias = None if bias is None else bias[order]
        yield [blocks(weight, _kind(linear.name, linear.spec))]
        if bias is not None:
            yield [bias.float()]
    for tensor in folded.floats():
        order = names.order(tensor.name, tensor.shape[0])
        rows = tensor.rows if order is None else [torch.cat(list(tensor.rows))[order]]
        yield (part.float() for part in rows) if len(tensor.shape) == 1 else rows
    factors = rope_factors(folded)
    if factors is not None:
        yield [factors]


def _append(file: IO[bytes], info: _Info, rows: Iterable[Tensor], alignment: int) -> None:
    """Append a tensor, padded before and after to a multiple of the alignment."""
    file.write(bytes(-file.tell() % alignment))
    start = file.tell()
    for part in rows:
        file.write(as_bytes(part))
    if file.tell() - start != info.nbytes:
        raise CheckpointError(f"tensor '{info.name}' is not what the config says")
    file.write(bytes(-info.nbytes % alignment))
