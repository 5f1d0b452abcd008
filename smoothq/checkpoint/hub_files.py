"""Where a model's files are: a directory, or a repo of the hub, which is downloaded."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RevisionNotFoundError,
)

from ..errors import CheckpointError
from .side_files import DOWNLOADED
from .weight_files import INDEX, SINGLE

HUB = "hf://"  # prefix of a hub id
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)


def resolve_directory(model: str, weights: bool = True) -> Path:
    """The local directory of a model; a hub id is downloaded first.

    Args:
        model: a directory, a hub id, or `hf://owner/name[@revision]`.
        weights: whether to download weights too, not just config, tokenizer and side files.

    Raises:
        CheckpointError: if there is no such directory or repo, or the hub cannot be reached.
    """
    path = Path(model)
    try:
        if path.is_dir():
            return path
    except OSError as error:  # such as a name longer than file names may be
        raise CheckpointError(f"model '{model[:40]}…' is no directory: {error.strerror}") from error
    odd = path.exists() or model.startswith((".", "/", "~")) or model.count("/") > 1
    if odd and not model.startswith(HUB):
        raise CheckpointError(f"model '{model}' is not a directory; give a directory or a hub id")
    repo_id, revision = parse_hub_id(model)
    patterns = [*DOWNLOADED, *(["*.safetensors"] if weights else [])]
    try:
        directory = Path(snapshot_download(repo_id, revision=revision, allow_patterns=patterns))
        if weights and not any((directory / file).is_file() for file in (SINGLE, INDEX)):
            bins = ["pytorch_model*.bin"]
            snapshot_download(repo_id, revision=revision, allow_patterns=bins)
        return directory
    except RevisionNotFoundError as error:
        raise CheckpointError(f"'{repo_id}' has no revision '{revision}' on the hub") from error
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"model '{model}' is neither a local directory nor a model that the hub gave us "
            f"({type(error).__name__}); check the name, the network and your access"
        ) from error


def parse_hub_id(text: str) -> tuple[str, str | None]:
    """Split `hf://owner/name[@revision]` into repo id and revision (None without one).

    A text without `hf://` is returned unchanged as the repo id.

    Raises:
        CheckpointError: for any other text with `hf://`.
    """
    if not text.startswith(HUB):
        return text, None
    repo_id, at, revision = text.removeprefix(HUB).partition("@")
    if not HUB_ID.fullmatch(repo_id) or (at and not revision):
        raise CheckpointError(f"'{text}' is no model of the hub; give hf://owner/name[@revision]")
    return repo_id, revision or None
