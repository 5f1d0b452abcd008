"""Crash-safe writing of a checkpoint: the output directory appears only when it is complete.

All work goes to `OUT.partial`: tensors to `model/`, the calibration's hidden states to
`hidden-*` files, and `state.json` records how much of both is complete and from which run. The
state is written after the data that it describes and replaces the previous state atomically, so a
run that was killed resumes from the last state. The checkpoint is assembled in `final/`, which the
module `placing` then moves to `OUT`.
"""

from __future__ import annotations

import copy
import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError
from torch import Tensor, get_num_threads
from torch import __version__ as torch_version
from transformers import PretrainedConfig

from ..compat import forget_weights_file, save_custom_code
from ..errors import CheckpointError, OutputError, SmoothqError, StoppedError, first_line
from .manifest import COMPRESSED_TENSORS, Manifest, RunKey, hashes_of, sha256_of
from .placing import Place, sync
from .shards import SHARD_BYTES, ShardState, ShardWriter
from .side_files import CARD, CONFIG, SideFiles, goes_along
from .tensor_file import Entry, TensorFile, is_intact
from .weight_files import tensor_files

log = logging.getLogger("smoothq")

STATE_FORMAT = 1
RESERVE_BYTES = 16 << 20  # disk space for config, tokenizer and card beside the tensors
Config = PretrainedConfig | Mapping[str, Any]  # of a model: an object, or what config.json says


class Environment(BaseModel, frozen=True):
    """What may change the last bits of a result; a run that resumes in another warns.

    Attributes:
        torch: version of PyTorch.
        device: device type, such as `cuda`.
        threads: PyTorch's intra-op CPU threads.
        processes: number of ranks.
    """

    torch: str
    device: str
    threads: int
    processes: int

    @classmethod
    def here(cls, device: str, processes: int) -> Self:
        """The environment of this process.

        Args:
            device: device type, such as `cuda`.
            processes: number of ranks.
        """
        threads = get_num_threads()
        return cls(torch=torch_version, device=device, threads=threads, processes=processes)


class State(BaseModel):
    """The progress of a run, as `state.json` stores it.

    Attributes:
        identity: the key of the run.
        surroundings: the environment in which the run began.
        blocks: number of finished blocks.
        shards: the tensors written so far.
        streams: name of a stream of hidden states → its micro-batches that enter the next block.
    """

    identity: RunKey
    surroundings: Environment
    blocks: int = 0
    shards: ShardState = ShardState()
    streams: dict[str, list[Entry]] = {}


class CheckpointWriter:
    """Writes tensors and metadata to a directory that appears only when complete.

    A context manager that locks `OUT.partial` against other processes. On leaving with an error of
    the input (a SmoothqError other than OutputError and StoppedError), or before the first block is
    finished, it deletes `OUT.partial`; after any other exception the finished blocks stay there and
    the same call resumes from them.

    Raises:
        CheckpointError: for an output that cannot be used.
        OutputError: if the disk refuses.
    """

    def __init__(
        self,
        out: Path,
        overwrite: bool = False,
        shard_bytes: int = SHARD_BYTES,
        resume: bool | None = None,
        every: int = 1,
        export: CheckpointWriter | None = None,
    ) -> None:
        """Nothing is read or written before `check` or `__enter__`.

        Args:
            out: the output directory.
            overwrite: whether to replace the content of an existing output.
            shard_bytes: size of a shard's tensors above which the next one begins.
            resume: True requires finished blocks to resume from, False starts anew, None resumes
                where it can.
            every: number of blocks between two saved states.
            export: writer of an export that is made from this output, which is deleted afterwards;
                this output counts as finished when the export is.
        """
        self._place = Place(out)
        self.out, self.partial = self._place.out, self._place.partial
        self.every = every
        self._export = export
        self._overwrite, self._shard_bytes, self._resume = overwrite, shard_bytes, resume
        self._lock: IO[str] | None = None
        self._state: State | None = None
        self._shards: ShardWriter | None = None

    @property
    def scratch(self) -> Path:
        """A directory for temporary files of the run."""
        return self.partial / "scratch"

    @property
    def written(self) -> dict[str, Entry]:
        """The tensors that have been written since the run began, by their names."""
        assert self._state is not None
        return {name: entry for shard in self._state.shards.shards for name, entry in shard.items()}

    def beside(self, name: str) -> Path:
        """The path for another step's work on the output's disk: `OUT.name` or `OUT/.name`."""
        return self._place.beside(name)

    def check(self, expected_bytes: int, sources: Iterable[Path] = ()) -> None:
        """Refuse an output before any work, and undo a placing that was interrupted.

        An output that is a finished checkpoint with a run in its manifest passes: `is_finished`
        compares that.

        Args:
            expected_bytes: that the run will write.
            sources: paths that the model is read from.

        Raises:
            CheckpointError: for an output that cannot be written, holds something else, would
                remove a source, or lies on a disk with too little space.
        """
        if self._place.was_stopped and not self._place.partial.is_symlink():
            with self._writing(), self._locked():
                self._place.undo()
        self._place.refuse_unfit(self._overwrite)
        self._place.refuse_sources(sources)
        if self._place.content and not self._overwrite and self._finished() is None:
            raise self._not_empty()
        free = shutil.disk_usage(self._place.disk).free + _size_of(self.partial)
        if free < expected_bytes + RESERVE_BYTES:
            raise CheckpointError(
                f"'{self.out}' needs about {expected_bytes / 1e9:.2f} GB of disk, "
                f"{free / 1e9:.2f} GB are free"
            )

    def is_finished(self, identity: RunKey, config: Config, side_files: SideFiles) -> bool:
        """Whether the output exists already, complete and from the same run and side files.

        Writes config, tokenizer and generation config to a temporary directory to hash them, so
        objects that cannot be written are refused here, before any work.

        Args:
            identity: the key of the run.
            config: of the output's model, an object or the content of `config.json`.
            side_files: of the output.

        Raises:
            CheckpointError: if the output is finished, but from another run.
        """
        with self._writing(), tempfile.TemporaryDirectory(prefix="smoothq-") as scratch:
            _write_config(config, Path(scratch))
            side_files.write_objects(Path(scratch))
            hashes = hashes_of(Path(scratch))
            hashes |= {name: sha256_of(path) for name, path in side_files.files.items()}
        if self._export is not None and self._export.is_made_of(
            identity.model_copy(update={"form": COMPRESSED_TENSORS}), hashes
        ):
            return True
        return self.is_made_of(identity, hashes)

    def is_made_of(self, identity: RunKey, side_files: Mapping[str, str]) -> bool:
        """Whether the output is complete, from this run, and with these side files.

        Args:
            identity: the key of the run.
            side_files: name in the output → SHA-256.

        Raises:
            CheckpointError: if the output is finished, but from another run.
        """
        manifest = None if self._overwrite else self._finished()
        if manifest is None:
            return False
        run = {} if manifest.run is None else manifest.run.model_dump()
        other = [name for name, value in identity.model_dump().items() if run.get(name) != value]
        stored_hashes, wanted_hashes = (
            {name: digest for name, digest in hashes.items() if goes_along(name)}
            for hashes in (manifest.files, side_files)
        )
        if stored_hashes != wanted_hashes:
            other.append("side files")
        if other:
            raise self._not_empty(other)
        return True

    def _finished(self) -> Manifest | None:
        """The manifest of an output that is complete, unchanged, and names its run; else None."""
        try:
            manifest = Manifest.read(self.out)
            stored = tensor_files(self.out, str(self.out))
            changed = any(
                sha256_of(self.out / name) != digest for name, digest in manifest.files.items()
            )
        except (CheckpointError, OSError):
            return None
        tensors = {name for names in manifest.tensors.values() for name in names}
        return None if manifest.run is None or changed or tensors != set(stored) else manifest

    def _not_empty(self, other: list[str] | None = None) -> CheckpointError:
        which = ""
        if other:
            which = f" and of another run ({', '.join(other)} {_differ(other)})"
        return CheckpointError(
            f"output directory '{self.out}' is not empty{which}; overwrite=True replaces it"
        )

    def __enter__(self) -> Self:
        with self._writing():
            self.partial.mkdir(parents=True, exist_ok=True)
            self._lock = self._take_lock()
        return self

    def _take_lock(self) -> IO[str]:
        lock = open(self.partial / "lock", "w")  # noqa: SIM115 (closing it releases the lock)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.close()
            raise CheckpointError(
                f"another process is writing '{self.out}'; wait for it, or give another output"
            ) from error
        return lock

    @contextmanager
    def _locked(self) -> Iterator[None]:
        lock = self._take_lock()
        try:
            yield
        finally:
            lock.close()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._shards is not None:
            self._shards.close()
        kept = isinstance(error, OutputError | StoppedError)
        of_input = isinstance(error, SmoothqError) and not kept
        if self._state is not None and isinstance(error, Exception):
            if of_input or not self._state.blocks:
                shutil.rmtree(self.partial, ignore_errors=True)
            else:
                log.warning(
                    "'%s' keeps %d finished blocks: the same command goes on from there",
                    self.partial,
                    self._state.blocks,
                )
        assert self._lock is not None
        self._lock.close()

    def begin(self, identity: RunKey, surroundings: Environment) -> State:
        """Prepare `OUT.partial` and return the state to resume from, or an empty state.

        Args:
            identity: the key of this run.
            surroundings: the environment of this run.

        Raises:
            CheckpointError: leaving `OUT.partial` unchanged, if it holds damaged work or work of
                another run, or none although `resume` requires it.
        """
        resumed = None if self._resume is False else self._resumable_state(identity, surroundings)
        with self._writing():
            if resumed is None:
                self._clear()
            model = self.partial / "model"
            model.mkdir(exist_ok=True)
            state = resumed or State(identity=identity, surroundings=surroundings)
            self._shards = ShardWriter(model, state.shards, self._shard_bytes)
            self._state = state
            kept_paths = {self._stream_path(name) for name in state.streams}
            for path in set(self.partial.glob("hidden-*")) - kept_paths:
                path.unlink()
            shutil.rmtree(self.scratch, ignore_errors=True)
            self.scratch.mkdir()
        return state.model_copy()

    def stream(self, name: str) -> Iterator[Tensor]:
        """The stored micro-batches of a stream of hidden states, one by one.

        Args:
            name: of the stream in `State.streams`.

        Raises:
            StoppedError: if the state has no such stream.
            CheckpointError: if a micro-batch's hash differs from the state.
        """
        assert self._state is not None
        if name not in self._state.streams:
            raise StoppedError(
                f"{self.partial} was begun without a {name}: go on without, or begin anew with "
                "resume=False"
            )
        entries = self._state.streams[name]
        with self._writing():
            file = TensorFile(self._stream_path(name), sum(entry.nbytes for entry in entries))
            for entry in entries:
                if not is_intact(file.blocks(entry), entry.sha256):
                    raise CheckpointError(f"{file.path} is not what was written there")
                yield file.read(entry)
            file.close()

    def add(self, tensors: dict[str, Tensor]) -> None:
        """Write tensors that are in memory, by their names in the checkpoint."""
        for name, tensor in tensors.items():
            self.add_rows(name, [tensor], tuple(tensor.shape), tensor.nbytes)

    def add_rows(
        self, name: str, rows: Iterable[Tensor], shape: tuple[int, ...], nbytes: int
    ) -> None:
        """Write a tensor that comes in chunks of rows.

        Args:
            name: in the checkpoint.
            rows: chunks along the first axis, in order.
            shape: of the whole tensor.
            nbytes: of the whole tensor.
        """
        assert self._shards is not None
        with self._writing():
            self._shards.add(name, rows, shape, nbytes)

    def commit(self, blocks: int, streams: Mapping[str, Iterable[Tensor]]) -> None:
        """Save a state from which another run can resume.

        Args:
            blocks: number of finished blocks.
            streams: name of a stream → the micro-batches of hidden states that enter the next
                block.
        """
        assert self._state is not None
        assert self._shards is not None
        with self._writing():
            self._shards.sync()
            before = {self._stream_path(name) for name in self._state.streams}
            self._state.blocks = blocks
            self._state.streams = {
                name: self._written(name, batches) for name, batches in streams.items()
            }
            text = self._state.model_dump_json()
            digest = hashlib.sha256(text.encode()).hexdigest()
            record = {"format": STATE_FORMAT, "sha256": digest, "state": text}
            fresh = self.partial / "state.json.new"
            fresh.write_text(json.dumps(record), encoding="utf-8")
            sync(fresh)
            os.replace(fresh, self.partial / "state.json")
            sync(self.partial)
            for path in before:
                path.unlink(missing_ok=True)
            self._shards.forget_copied()

    def assemble(self, config: Config, side_files: SideFiles, card: str) -> Path:
        """Assemble the checkpoint in `OUT.partial/final` and return that directory.

        Args:
            config: of the model, an object or the content of `config.json`.
            side_files: to copy or write.
            card: text of the model card.
        """
        assert self._shards is not None
        assert self._state is not None
        final = self._place.final
        with self._writing():
            final.mkdir()
            self._shards.finish(final)
            side_files.write(final)
            _write_config(config, final)
            (final / CARD).write_text(card, encoding="utf-8")
            Manifest.of(final, self.written, self._state.identity).write(final)
            for path in (*final.rglob("*"), final):
                sync(path)
        return final

    def place(self) -> None:
        """Move the assembled checkpoint to the output, and delete `OUT.partial`."""
        with self._writing():
            self._place.put()

    def _resumable_state(self, identity: RunKey, surroundings: Environment) -> State | None:
        """The state in `OUT.partial`, or None without one; errors as in `begin`."""
        path = self.partial / "state.json"
        if not path.exists():
            if self._resume:
                raise CheckpointError(
                    f"'{self.partial}' holds no finished block to go on from; leave resume=True out"
                )
            return None
        anew = "begin anew with resume=False"
        try:
            record = json.loads(path.read_bytes())
            if record["format"] != STATE_FORMAT:
                raise CheckpointError(
                    f"{path} has format {record['format']}, this smoothq goes on from "
                    f"{STATE_FORMAT}; go on with the version that wrote it, or {anew}"
                )
            state = State.model_validate_json(record["state"])
            if hashlib.sha256(record["state"].encode()).hexdigest() != record["sha256"]:
                raise ValueError("its hash is another")
        except (ValueError, KeyError, TypeError, AttributeError, ValidationError) as error:
            raise CheckpointError(f"{path} is damaged ({first_line(error)}); {anew}") from error
        key, stored_key = identity.model_dump(), state.identity.model_dump()
        other = [name for name, value in key.items() if value != stored_key[name]]
        if other:
            raise CheckpointError(
                f"'{self.partial}' holds {state.blocks} finished blocks of another run: its "
                f"{' and '.join(other)} {_differ(other)}; give the same "
                f"command to go on, or {anew}"
            )
        if surroundings != state.surroundings:
            log.warning(
                "the finished blocks were made on other surroundings (%s): the last bits of the "
                "result may differ from those of one run",
                state.surroundings,
            )
        ShardWriter.take_back(self._place.final, self.partial / "model")
        return state

    def _clear(self) -> None:
        for path in self.partial.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != "lock":
                path.unlink()

    def _stream_path(self, name: str) -> Path:
        assert self._state is not None
        return self.partial / f"hidden-{name}-{self._state.blocks:05d}"

    def _written(self, name: str, batches: Iterable[Tensor]) -> list[Entry]:
        file = TensorFile(self._stream_path(name))
        entries = [file.append([batch], tuple(batch.shape)) for batch in batches]
        file.sync()
        file.close()
        return entries

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Turn errors of the file system into an OutputError of one line."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
            reason = "the disk is full" if full else str(error)
            raise OutputError(f"cannot write '{self.out}': {reason}") from error


def _write_config(config: Config, directory: Path) -> None:
    """Write `config.json`, with the Python files of a model with remote code.

    The content of a `config.json` is written as it is: the Python files are side files then.

    `save_pretrained` is not used, because it refuses generation parameters, which older configs
    have.
    """
    if not isinstance(config, PretrainedConfig):
        (directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        return
    written = copy.deepcopy(config)
    forget_weights_file(written)
    save_custom_code(written, directory)
    written.to_json_file(directory / CONFIG, use_diff=True)


def _differ(names: list[str]) -> str:
    return "differ" if len(names) > 1 or names[0].endswith("s") else "differs"


def _size_of(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
