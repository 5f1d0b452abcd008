"""Export to compressed-tensors: the codes are repacked, without dequantizing them."""

from __future__ import annotations

import copy
import hashlib
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

from transformers import PretrainedConfig

from ..checkpoint.checkpoint_source import CheckpointSource
from ..checkpoint.manifest import MANIFEST, Manifest, RunKey, sha256_of
from ..checkpoint.writer import CheckpointWriter, Environment
from ..modules import InputSpec, WeightSpec
from ..progress import Progress
from ..report.model_card import served_card
from ..report.results import ExportResult
from ..version import __version__
from .reader import ExportReader
from .schemes import METHOD, Inputs, Scheme, Strategy, quantization_config

# Fields of configs with the number of multi-token prediction layers.
PREDICTING = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers")


def export_compressed_tensors(
    directory: Path,
    writer: CheckpointWriter,
    progress: Progress | None = None,
    trust_remote_code: bool = False,
) -> ExportResult:
    """Write a smoothq checkpoint in the compressed-tensors format.

    Readers compute the scales of dynamic inputs by their own convention: the absolute maximum over
    127.5 (8 bits) or 7.5 (4 bits).

    Args:
        directory: of a checkpoint that smoothq wrote.
        writer: of the output.
        progress: called at each block.
        trust_remote_code: whether to run code beside the model.

    Raises:
        CheckpointError: for a directory that is no smoothq checkpoint, or an output that cannot be
            used.
        RecipeError: for a recipe that the format cannot express.
        OutputError: if the disk refuses.
    """
    start = time.perf_counter()
    folded = ExportReader(directory, METHOD, trust_remote_code)
    source = folded.source
    side_files = source.side_files()
    needed = source.nbytes + folded.added_bytes + side_files.nbytes
    writer.check(needed, source.paths)
    schemes = {name: scheme_of(*of_linear) for name, of_linear in folded.forms.items()}
    config = _config(folded, schemes)
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
        written = CheckpointSource(writer.out, str(writer.out), trust_remote_code)
        return replace(exported, bytes_after=written.nbytes)
    nbytes = 0
    with writer:
        writer.begin(identity, Environment.here("cpu", 1))
        for linear in folded.linears(progress):
            scheme = schemes[linear.name]
            tensors = scheme.tensors(linear.weight, linear.spec.grid, dtype, linear.input_scale)
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


def _config(folded: ExportReader, schemes: dict[str, Scheme]) -> PretrainedConfig:
    """The output's config: the checkpoint's, with the schemes of its linears by name."""
    config = copy.deepcopy(folded.source.config)
    config.quantization_config = quantization_config(schemes, folded.float_linears)
    for part in (config, config.get_text_config(decoder=True)):
        if folded.unties:
            part.tie_word_embeddings = False
        for field in PREDICTING if folded.left_out else ():
            if getattr(part, field, 0):
                setattr(part, field, 0)
    return config


def scheme_of(spec: WeightSpec, site_input: InputSpec) -> Scheme:
    """The compressed-tensors scheme of a quantized linear.

    Args:
        spec: of its weight.
        site_input: of its input, in a mode that `refuse_blockers` lets pass.
    """
    grid, mode = spec.grid, site_input.mode
    strategy: Strategy = grid.granularity
    if grid.shares_scale:
        strategy = "tensor_group"
    elif spec.groups == 1 and strategy == "group":
        strategy = "channel"
    return Scheme(
        grid.bits,
        strategy,
        grid.group_size if strategy in ("group", "tensor_group") else None,
        _INPUTS[mode],
        site_input.bits,
        grid.symmetric,
        "float" if spec.floating else "int",
        "float" if site_input.emulated else "int",
        site_input.group_size if mode in ("fp_group", "fp_e8m0", "fp_e4m3") else None,
    )


_INPUTS: dict[str, Inputs] = {
    "float": "float",
    "token": "token",
    "static": "static",
    "fp_token": "token",
    "fp_static": "static",
    "fp_group": "group",
    "fp_e8m0": "group",
    "fp_e4m3": "tensor_group",
}


def card_of(directory: Path) -> str:
    """The text of a checkpoint's model card, or an empty string."""
    card = directory / "README.md"
    return card.read_text(encoding="utf-8") if card.is_file() else ""


def _identity(directory: Path) -> RunKey:
    """The run key of an export: that of the checkpoint's run in this form and version.

    For a checkpoint whose manifest names no run, the manifest's hash stands for the model.
    """
    path = directory / MANIFEST
    run = Manifest.read(directory).run if path.is_file() else None
    if run is None:
        digest = sha256_of(path) if path.is_file() else ""
        empty = hashlib.sha256(b"").hexdigest()
        run = RunKey(version=__version__, recipe=empty, model=digest, calibration=empty)
    return run.model_copy(update={"form": METHOD, "version": __version__})
