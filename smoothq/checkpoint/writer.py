"""Writing a checkpoint so that an unfinished one is never mistaken for a finished one.

Everything goes to `OUT.partial`; the last act is renaming it to `OUT`. Shards are written as
they fill, so that memory holds at most one. Refused or failed work leaves nothing behind.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from ..errors import CheckpointError
from .stream import INDEX, SINGLE

SHARD_BYTES = 512 << 20  # held in memory until it is full
RESERVE_BYTES = 16 << 20  # room for config, tokenizer and card beside the tensors


def _without_spaces(path: Path) -> None:
    """Write a JSON file again without the whitespace, which is half of a tokenizer's."""
    if path.is_file():
        content = json.loads(path.read_text(encoding="utf-8"))
        compact = json.dumps(content, separators=(",", ":"), ensure_ascii=False)
        path.write_text(compact, encoding="utf-8")


class CheckpointWriter:
    """Writes tensors and metadata to a directory that appears only when complete.

    A context manager: leaving it with an error removes `OUT.partial`; an interruption (Ctrl-C, a
    kill) leaves it. Raises CheckpointError where the output cannot be
    written, or is not empty and `overwrite` is not set.
    """

    def __init__(self, out: Path, overwrite: bool = False, shard_bytes: int = SHARD_BYTES) -> None:
        self.out, self.partial = out, out.with_name(out.name + ".partial")
        self._overwrite, self._shard_bytes = overwrite, shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self.total_bytes = 0

    def check(self, expected_bytes: int) -> None:
        """Refuse, before any work, an output that cannot be written to or is too small a disk."""
        if self.out.exists() and not self.out.is_dir():
            raise CheckpointError(f"output '{self.out}' exists and is not a directory")
        if self.out.is_dir() and any(self.out.iterdir()) and not self._overwrite:
            raise CheckpointError(
                f"output directory '{self.out}' is not empty; use --overwrite to replace it"
            )
        existing = next(p for p in (self.out, *self.out.absolute().parents) if p.exists())
        if not os.access(existing, os.W_OK):
            raise CheckpointError(f"no permission to write to '{existing}'")
        free = shutil.disk_usage(existing).free
        if free < expected_bytes + RESERVE_BYTES:
            raise CheckpointError(
                f"'{self.out}' needs about {expected_bytes / 1e9:.2f} GB of disk, "
                f"{free / 1e9:.2f} GB are free"
            )

    def __enter__(self) -> Self:
        with self._writing():
            shutil.rmtree(self.partial, ignore_errors=True)
            self.partial.mkdir(parents=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, Exception):
            shutil.rmtree(self.partial, ignore_errors=True)

    def add(self, tensors: dict[str, Tensor]) -> None:
        """Take tensors in; a shard is written whenever one is full."""
        for name, tensor in tensors.items():
            if self._pending and self._pending_bytes + tensor.nbytes > self._shard_bytes:
                self._flush()
            self._pending[name] = tensor.contiguous()
            self._pending_bytes += tensor.nbytes
            self.total_bytes += tensor.nbytes

    def finish(
        self,
        config: PretrainedConfig,
        tokenizer: PreTrainedTokenizerBase | None,
        generation_config: GenerationConfig | None,
        card: str,
    ) -> None:
        """Write the last shard, the index and the metadata, and move everything into place."""
        self._flush()
        with self._writing():
            self._name_shards()
            config.save_pretrained(self.partial)
            if generation_config is not None:
                generation_config.save_pretrained(self.partial)
            if tokenizer is not None:
                tokenizer.save_pretrained(self.partial)
                _without_spaces(self.partial / "tokenizer.json")
            (self.partial / "README.md").write_text(card)
            if self.out.exists():
                shutil.rmtree(self.out)
            os.replace(self.partial, self.out)

    def _flush(self) -> None:
        if not self._pending:
            return
        path = self.partial / f"shard-{len(self._shards):05d}.safetensors"
        with self._writing():
            save_file(self._pending, path, metadata={"format": "pt"})
        self._shards.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0

    def _name_shards(self) -> None:
        count = len(self._shards)
        final = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        if count == 1:
            final = [SINGLE]
        for i, name in enumerate(final):
            os.replace(self.partial / f"shard-{i:05d}.safetensors", self.partial / name)
        if count > 1:
            weight_map = {
                name: file
                for file, names in zip(final, self._shards, strict=True)
                for name in names
            }
            index: dict[str, Any] = {
                "metadata": {"total_size": self.total_bytes},
                "weight_map": weight_map,
            }
            (self.partial / INDEX).write_text(json.dumps(index, indent=2))

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Turn what the disk says into one line."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
            reason = "the disk is full" if full else str(error)
            raise CheckpointError(
                f"cannot write '{self.out}': {reason}; nothing was left there"
            ) from error
