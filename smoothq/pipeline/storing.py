"""The tensors of a run's output: of a quantized block, and outside the blocks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..modules.quantized_embedding import EMBEDDING_BITS
from ..plan.account import outside_blocks
from ..rounding.packing import pack, packed_like
from .ends import Block, coded_rows, stored_rows, tower_tensors
from .job import Job


def store_ends(job: Job) -> None:
    """Store the tensors outside the blocks: embedding, head, final norm, vision towers, extras."""
    plan, source = job.plan, job.source
    parts = plan.parts
    tables = {f"{name}.weight": name for name in parts.ends if plan.tables}
    checked = (*parts.ends, parts.final_norm, parts.positions, parts.entry_norm)
    for name, spec in outside_blocks(job.account, plan, source).items():
        if name.rpartition(".")[0] in plan.towers:
            continue
        if name in tables:
            _store_table(job, tables[name])
        elif name in source.specs or name in source.extras:
            chunks = stored_rows(source, name, name.rpartition(".")[0] in checked)
            cast = (rows.to("cpu", spec.dtype) for rows in chunks)
            job.output.add_rows(name, cast, spec.shape, spec.nbytes)
        elif name.rpartition(".")[0] not in tables.values():
            job.output.add({name: job.model.get_buffer(name).to(spec.dtype)})
    for name in plan.towers:
        job.output.add(tower_tensors(source, job.model, plan, name, job.account))


def _store_table(job: Job, name: str) -> None:
    """Store an embedding or a head as 8-bit codes with one scale per row, in chunks of rows."""
    weight = job.model.get_submodule(name).get_parameter("weight")
    scales: list[Tensor] = []

    def packed() -> Iterator[Tensor]:
        for rounded in coded_rows(job.source, f"{name}.weight"):
            scales.append(rounded.scales.scale)
            yield pack(rounded.codes, EMBEDDING_BITS)

    like = packed_like(weight.shape[0], weight.shape[1], EMBEDDING_BITS)
    job.output.add_rows(f"{name}.weight", packed(), tuple(like.shape), like.nbytes)
    if scales:
        job.output.add({f"{name}.weight_scale": torch.cat(scales)})


def block_tensors(job: Job, block: Block) -> dict[str, Tensor]:
    """A block's tensors by full name, each in its stored dtype, on the CPU."""
    stored = {}
    for key, tensor in block.module.state_dict().items():
        name = f"{block.name}.{key}"
        dtype = job.account[name].dtype
        if dtype == torch.float64 and name in job.source.specs:
            # Blocks are loaded in float32: a tensor that no transform changed is stored as it was.
            ((_, original),) = job.source.tensors([name])
            if torch.equal(original.to(tensor.dtype), tensor.cpu()):
                tensor = original
        stored[name] = tensor.to("cpu", dtype)
    return stored
