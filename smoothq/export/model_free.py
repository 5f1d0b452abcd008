"""Quantizes stored tensors without a model's class: for models that are newer than transformers.

Linears are told by their names and shapes, and each is rounded to nearest, for no text can be sent
through a model that nobody can build. Files are read one after another and matrices in chunks of
rows, so memory does not grow with the model. The output is in the compressed-tensors format: a
server that knows the model loads it. What has to be known of inputs is refused by name.
"""

from __future__ import annotations

import fnmatch
import hashlib
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from ..architectures.by_name import merged_with
from ..checkpoint.manifest import COMPRESSED_TENSORS, RunKey
from ..checkpoint.weight_files import families_of, tensor_files, tensor_shapes
from ..checkpoint.writer import CheckpointWriter, Environment
from ..data.tokens import Tokens
from ..errors import NumericsError, RecipeError
from ..modules import InputSpec, WeightSpec
from ..plan.plan import Bits
from ..plan.portability import input_blockers
from ..plan.sites import plain_input, weight_grid
from ..progress import Progress, silent
from ..recipe.recipe import FLOAT_BITS, Recipe
from ..report.model_card import model_card, served_card
from ..report.quantize_result import QuantizeResult
from ..report.results import ExportResult
from ..rounding.float_grid import BLOCK
from ..rounding.rtn import round_to_nearest
from ..runtime.memory import peak_memory, steady_heap
from ..version import __version__
from .compressed_tensors import scheme_of
from .schemes import Scheme, quantization_config
from .stored_model import StoredModel

MEMORY = 2 * 10**9  # bytes that a run takes at most, libraries included
CHUNK_WEIGHTS = 1 << 23  # of a matrix that are rounded at a time, unless BLOCK rows are more
FORM = f"{COMPRESSED_TENSORS}, model_free"  # in the run's key
CODES = ("weight_packed", "weight")  # names of a linear's codes, by layout
BY_ROWS = ("weight_scale", "weight_zero_point")  # tensors that grow with a linear's rows


@dataclass(frozen=True)
class _Linear:
    """A linear that is quantized.

    weight, input: their forms. dtype: of its float weight.
    """

    weight: WeightSpec
    input: InputSpec
    dtype: torch.dtype

    @cached_property
    def scheme(self) -> Scheme:
        """Its scheme in the format."""
        return scheme_of(self.weight, self.input)

    def stored(self, rows: Tensor, largest: float | None) -> dict[str, Tensor]:
        """The tensors of some of its rows, float (n, K), as the format stores them.

        largest: as of `Grid.find_scales`.
        """
        grid = self.weight.grid
        rounded = round_to_nearest(rows, grid, largest)
        return self.scheme.tensors(rounded, grid, self.dtype, None)

    def joined(self, parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """The tensors of the whole from those of chunks of its rows."""
        shape = (self.weight.out_features, self.weight.in_features)
        whole = {
            key: torch.cat([part[key] for part in parts]) if key in BY_ROWS else tensor
            for key, tensor in parts[0].items()
        }
        if "weight_shape" in whole:
            whole["weight_shape"] = torch.tensor(shape, dtype=torch.int64)
        return whole


@dataclass(frozen=True)
class _Work:
    """What a run does to a stored model.

    recipe: plain rounding. linears: those that are quantized, by full names. kept: those that the
    recipe keeps. notes: for the user.
    """

    model: StoredModel
    recipe: Recipe
    linears: dict[str, _Linear]
    kept: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def schemes(self) -> dict[str, Scheme]:
        """The scheme of every quantized linear."""
        return {name: linear.scheme for name, linear in self.linears.items()}

    @property
    def floats(self) -> list[str]:
        """Modules that readers must leave in float: a head that is tied to the embedding, too."""
        stacks = [name.rpartition(".")[0] for name in self.model.stacks]
        others = [name for name in self.model.matrices if name not in self.linears]
        return list(dict.fromkeys([*others, *stacks, "lm_head"]))

    def bits(self, linear_bytes: int) -> Bits:
        """Averages over the linears that are quantized or kept."""
        kept = [self.model.linears[name] for name in self.kept]
        stored = 8 * (linear_bytes + sum(spec.nbytes for spec in kept))
        elements = sum(linear.weight.elements for linear in self.linears.values())
        inputs = [linear.input for linear in self.linears.values()]
        width = sum(spec.width for spec in inputs) + sum(spec.shape[1] for spec in kept)
        read = sum(spec.bits * spec.width + spec.scale_bits(1) for spec in inputs)
        read += sum(FLOAT_BITS * spec.shape[1] for spec in kept)
        weight = stored / (elements + sum(spec.elements for spec in kept))
        return Bits(weight, read / width, read / width)


def quantize_model_free(
    model: str,
    recipe: Recipe,
    writer: CheckpointWriter,
    device: torch.device,
    progress: Progress | None = None,
) -> QuantizeResult:
    """Quantize a model's stored tensors; its class is neither known nor built.

    Args:
        model: a directory or a hub id.
        recipe: whose grids are taken; methods that need a class or text are left out with a note.
        writer: of the output.
        device: to round on.
        progress: called at each file of weights.

    Raises:
        CheckpointError: for a model that cannot be read, or an output that cannot be used.
        UnsupportedModelError: for a model that is quantized already.
        RecipeError: for a recipe that needs text or a class, or that matches no linear.
        NumericsError: for weights that are not finite.
        OutputError: if the disk refuses.
    """
    start = time.perf_counter()
    plain, left_out = _plain(recipe)
    writer.check(0)
    stored = StoredModel.open(model)
    writer.check(stored.nbytes, stored.paths)
    work = _planned(stored, plain, left_out)
    config = stored.config | {"quantization_config": quantization_config(work.schemes, work.floats)}
    identity = RunKey(
        version=__version__,
        recipe=hashlib.sha256(plain.model_dump_json().encode()).hexdigest(),
        model=stored.fingerprint(),
        calibration=Tokens(()).fingerprint(),
        form=FORM,
    )
    if writer.is_finished(identity, config, stored.side_files):
        files = set(tensor_files(writer.out, str(writer.out)).values())
        specs = {name: spec for path in files for name, spec in tensor_shapes(path).items()}
        nbytes = {name: spec.nbytes for name, spec in specs.items()}
        return replace(_result(work, nbytes, start), repeated=True)
    with writer, steady_heap():
        finished = writer.begin(identity, Environment.here(device.type, 1)).blocks
        for index, path in enumerate(stored.paths_of_weights):
            if index >= finished:
                (progress or silent)(index, len(stored.paths_of_weights), "round")
                _add_file(work, path, writer, device)
                writer.commit(index + 1, {})
        nbytes = {name: entry.nbytes for name, entry in writer.written.items()}
        result = _result(work, nbytes, start)
        assert result.export is not None
        card = served_card(model_card(result), result.export)
        writer.assemble(config, stored.side_files, card)
        writer.place()
    return result


def _plain(recipe: Recipe) -> tuple[Recipe, str]:
    """The recipe without what needs a class or text, and a note of what that was, or nothing.

    Raises RecipeError for what cannot be left out without changing the formats that were asked for.
    """
    a, w = recipe.activations, recipe.weights
    refused = {
        "a scale of the whole matrix is not found in chunks of rows: weights.granularity": (
            w.granularity == "tensor"
        ),
        "static scales of inputs are calibrated on text: activations.static": a.static,
        "NVFP4 inputs have a scale of the tensor that is calibrated on text; NVFP4 weights alone "
        "are w4a16-nvfp4: activations.group_scale": a.group_scale == "e4m3" and a.is_float,
        "our attention and KV cache need a class: kv_cache, attention": recipe.quantizes_attention,
        "embedding and head stay as they are: embeddings": recipe.embeddings != FLOAT_BITS,
        "towers stay as they are: vision": recipe.vision != FLOAT_BITS,
        "tensors keep their dtype: dtype": recipe.dtype != "auto",
    }
    reasons = [reason for reason, asked in refused.items() if asked]
    if reasons:
        raise RecipeError(
            f"recipe '{recipe.name}' without a model's class: {'; '.join(reasons)}; change that, "
            "or leave model_free=True out"
        )
    methods = {
        "smoothing": recipe.smoothing is not None,
        "rotation": recipe.rotation is not None,
        "runtime smoothing": recipe.runtime_smoothing is not None,
        "GPTQ": w.rounding == "gptq",
        "tuning": recipe.tuning is not None,
    }
    left_out = [method for method, asked in methods.items() if asked]
    none = dict.fromkeys(("smoothing", "rotation", "runtime_smoothing", "tuning"))
    plain = recipe.edit(weights__rounding="rtn", **none)
    if not left_out:
        return plain, ""
    return plain, (
        f"without a model's class, weights are rounded to nearest: {', '.join(left_out)} "
        f"{'are' if len(left_out) > 1 else 'is'} left out"
    )


def _planned(model: StoredModel, recipe: Recipe, left_out: str) -> _Work:
    """What is done to each matrix. left_out: as of `_plain`."""
    _check_patterns(model, recipe)
    linears: dict[str, _Linear] = {}
    kept, odd = [], []
    for name, spec in model.linears.items():
        wanted = _of_linear(recipe, name)
        rows, columns = spec.shape
        if recipe.keeps(name):
            kept.append(name)
        elif not _divides(wanted, columns):
            odd.append(name)
        else:
            weight = WeightSpec(rows, columns, weight_grid(wanted, columns, name))
            linears[name] = _Linear(weight, plain_input(wanted, columns), spec.dtype)
    if odd:
        raise RecipeError(
            f"{model.name}: no group of this recipe divides the inputs of {len(odd)} linears: "
            f"{families_of(odd)}; name them in keep, or take a format by channel, such as fp8"
        )
    if not linears:
        raise RecipeError(
            f"{model.name}: no tensor is a linear that this recipe quantizes, by name and shape; "
            f"there are {families_of(model.files)}"
        )
    blockers = {str(b) for linear in linears.values() for b in input_blockers(linear.input)}
    if blockers:
        raise RecipeError(f"{model.name}: servers cannot run it. {'; '.join(sorted(blockers))}")
    for name in linears:
        merged = merged_with(name, model.linears)
        if len({linears[other].scheme if other in linears else None for other in merged}) > 1:
            raise RecipeError(
                f"{model.name}: servers hold {', '.join(merged)} as one matrix, and here formats "
                "differ: one format for them, or keep all of them in float"
            )
    others = [name for name in model.matrices if name not in model.linears]
    notes = [left_out] if left_out else []
    notes.append(
        f"{len(linears)} linears are told by name and shape, {families_of(linears)}"
        + (f"; other matrices stay in float: {families_of(others)}" if others else "")
    )
    if model.stacks:
        notes.append(
            f"{len(model.stacks)} stacks of experts' matrices stay in float, for only matrices of "
            f"their own are quantized without a model's class: {families_of(model.stacks)}"
        )
    return _Work(model, recipe, linears, tuple(kept), tuple(notes))


def _of_linear(recipe: Recipe, name: str) -> Recipe:
    """The recipe of one linear, by its full name: grids alone."""
    if recipe.override(name) is None:
        return recipe
    return _plain(recipe.for_module(name))[0]


def _check_patterns(model: StoredModel, recipe: Recipe) -> None:
    """Refuse patterns that match nothing: a typing error in `keep` would quantize the linear."""
    patterns = [(pattern, model.matrices) for pattern in recipe.keep]
    patterns += [(override.match, model.linears) for override in recipe.overrides]
    for pattern, names in patterns:
        if not fnmatch.filter(names, pattern):
            raise RecipeError(
                f"the pattern '{pattern}' matches no linear of the model; they are called like "
                f"'{next(iter(model.linears), next(iter(model.files)))}'"
            )


def _divides(recipe: Recipe, columns: int) -> bool:
    """Whether the groups of weight and input, where they have any, divide a row."""
    w, a = recipe.weights, recipe.activations
    sizes = []
    if w.granularity == "group":
        sizes.append(32 if w.group_size == "auto" else w.group_size)
    if a.is_float and a.granularity == "group":
        sizes.append(a.group_size)
    return all(columns % size == 0 for size in sizes)


def _add_file(work: _Work, path: Path, writer: CheckpointWriter, device: torch.device) -> None:
    """Write what becomes of the tensors of one file."""
    model = work.model
    for tensor in model.names_in(path):
        name, _, leaf = tensor.rpartition(".")
        linear = work.linears.get(name) if leaf == "weight" else None
        if linear is None:
            spec = model.specs[tensor]
            writer.add_rows(tensor, model.rows(tensor), spec.shape, spec.nbytes)
        else:
            _add_linear(work, name, linear, writer, device)


def _add_linear(
    work: _Work, name: str, linear: _Linear, writer: CheckpointWriter, device: torch.device
) -> None:
    """Round a linear in chunks of rows, and write codes as they come; scales are kept till then."""
    largest = _largest(work, name) if linear.weight.grid.shares_scale else None
    chunks = (linear.stored(rows.to(device), largest) for rows in _float_rows(work.model, name))
    first, others = next(chunks), list[dict[str, Tensor]]()
    key = next(key for key in CODES if key in first)
    rows, row = linear.weight.out_features, first[key][0]

    def codes() -> Iterator[Tensor]:
        for part in chain([first], chunks):
            yield part.pop(key)
            others.append(part)

    writer.add_rows(f"{name}.{key}", codes(), (rows, len(row)), rows * row.nbytes)
    writer.add({f"{name}.{key}": tensor for key, tensor in linear.joined(others).items()})


def _largest(work: _Work, name: str) -> float:
    """The largest magnitude of the weights that share a linear's scale of the tensor."""
    return max(
        float(rows.abs().amax())
        for other in merged_with(name, work.linears)
        for rows in _float_rows(work.model, other)
    )


def _float_rows(model: StoredModel, name: str) -> Iterator[Tensor]:
    """The weight of a linear in chunks of rows, whole blocks of them.

    Raises NumericsError for values that are not finite.
    """
    columns = model.linears[name].shape[1]
    count = max(1, CHUNK_WEIGHTS // (BLOCK * columns)) * BLOCK
    for rows in model.rows(f"{name}.weight", count):
        if not torch.isfinite(rows).all():
            raise NumericsError(
                f"{model.name}: {name}.weight has NaN or Inf; keep it in float, or mend the model"
            )
        yield rows


def _result(work: _Work, nbytes: dict[str, int], start: float) -> QuantizeResult:
    """What a run came to. nbytes: of the output's tensors. start: when the run began."""
    linear_bytes = 0
    for tensor, size in nbytes.items():
        name, _, leaf = tensor.rpartition(".")
        linear_bytes += size if name in work.linears and leaf != "bias" else 0
    before, after = work.model.nbytes, sum(nbytes.values())
    seconds = time.perf_counter() - start
    kinds = dict(Counter(str(scheme) for scheme in work.schemes.values()))
    return QuantizeResult(
        work.model.name,
        work.recipe,
        work.bits(linear_bytes),
        before,
        after,
        linear_bytes,
        seconds,
        peak_memory(),
        work.notes,
        export=ExportResult(before, after, 0, kinds, seconds),
    )
