"""A quantized checkpoint in a format that others read: no float copy of it is ever made."""

from __future__ import annotations

import copy
import hashlib
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

from ..checkpoint.manifest import (
    MANIFEST,
    Manifest,
    RunKey,
    sha256_of,
)
from ..checkpoint.source import CheckpointSource
from ..checkpoint.writer import CheckpointWriter, Environment
from ..modules import InputSpec, WeightSpec
from ..progress import Progress
from ..report.figures import served_card
from ..report.results import ExportResult
from ..version import __version__
from .reader import ExportReader
from .schemes import METHOD, Scheme, quantization_config

# Fields of configs that say how many layers predict further tokens.
PREDICTING = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers")


def export_compressed_tensors(
    directory: Path,
    writer: CheckpointWriter,
    progress: Progress | None = None,
) -> ExportResult:
    """Write a checkpoint of ours in the compressed-tensors format.

    The scales of inputs that readers find by themselves follow their convention: the maximum over
    127.5, or over 7.5.

    Raises CheckpointError for a directory that is none of ours or an output that cannot be taken,
    RecipeError for a recipe with something that the format has no place for.
    """
    start = time.perf_counter()
    folded = ExportReader(directory, METHOD)
    source = folded.source
    side_files = source.side_files()
    needed = source.nbytes + folded.added_bytes + side_files.nbytes
    writer.check(needed, source.paths)
    schemes = {name: scheme_of(*of_linear) for name, of_linear in folded.forms.items()}
    config = copy.deepcopy(source.config)
    config.quantization_config = quantization_config(schemes, folded.float_linears)
    if folded.unties:
        for part in (config, config.get_text_config(decoder=True)):
            part.tie_word_embeddings = False
    if folded.left_out:
        for part in (config, config.get_text_config(decoder=True)):
            for field in PREDICTING:
                if getattr(part, field, 0):
                    setattr(part, field, 0)
    identity, dtype = _identity(directory), folded.plan.stored_dtype
    exported = ExportResult(
        source.nbytes,
        0,
        folded.added_bytes,
        dict(Counter(map(str, schemes.values()))),
        0.0,
        tuple(folded.left_out),
        repeated=True,
    )
    if writer.is_finished(identity, config, side_files):
        return replace(exported, bytes_after=CheckpointSource(writer.out, str(writer.out)).nbytes)
    nbytes = 0
    with writer:
        writer.begin(identity, Environment.here("cpu", 1))
        for linear in folded.linears(progress):
            scheme = schemes[linear.name]
            tensors = scheme.tensors(linear.weight, dtype, linear.input_scale)
            if linear.bias is not None:
                tensors["bias"] = linear.bias
            writer.add({f"{linear.name}.{key}": tensor for key, tensor in tensors.items()})
            nbytes += sum(tensor.nbytes for tensor in tensors.values())
        for tensor in folded.floats():
            writer.add_rows(tensor.name, tensor.rows, tensor.shape, tensor.nbytes)
            nbytes += tensor.nbytes
        seconds = time.perf_counter() - start
        exported = replace(exported, bytes_after=nbytes, seconds=seconds, repeated=False)
        writer.assemble(config, side_files, served_card(card_of(directory), exported))
        writer.place()
    return exported


def scheme_of(spec: WeightSpec, site_input: InputSpec) -> Scheme:
    """How the format says what a linear of ours is; of a plan without obstacles."""
    grouped = spec.groups > 1
    mode = site_input.mode
    assert mode in ("float", "token", "static")
    return Scheme(
        spec.grid.bits,
        "group" if grouped else "channel",
        spec.grid.group_size if grouped else None,
        mode,
        site_input.bits,
        spec.grid.symmetric,
    )


def card_of(directory: Path) -> str:
    """The model card of a checkpoint, or nothing."""
    card = directory / "README.md"
    return card.read_text(encoding="utf-8") if card.is_file() else ""


def _identity(directory: Path) -> RunKey:
    """What an export follows from: what its checkpoint does, else the manifest of that."""
    path = directory / MANIFEST
    run = Manifest.read(directory).run if path.is_file() else None
    if run is None:
        digest = sha256_of(path) if path.is_file() else ""
        empty = hashlib.sha256(b"").hexdigest()
        run = RunKey(version=__version__, recipe=empty, model=digest, calibration=empty)
    return run.model_copy(update={"form": METHOD, "version": __version__})
