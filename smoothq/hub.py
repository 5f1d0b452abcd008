"""Publishing a quantized model on the Hugging Face hub."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    EvalResult,
    HfApi,
    ModelCard,
    RepoCard,
)
from huggingface_hub.errors import HfHubHTTPError, RevisionNotFoundError
from pydantic import TypeAdapter, ValidationError

from .checkpoint.hub_files import HUB_ID
from .checkpoint.manifest import MANIFEST, Manifest
from .checkpoint.placing import Place
from .checkpoint.weight_files import tensor_files
from .errors import CheckpointError, first_line
from .evaluation.divergence import Agreement
from .evaluation.evaluate import Evaluation, TextResult
from .evaluation.perplexity import Perplexity
from .evaluation.tasks import TaskResults, TaskValue
from .report.model_card import LOADING
from .version import __version__

CARD = "README.md"
# Files of an earlier push that transformers would still read: they are deleted where not replaced.
_STALE = re.compile(
    r"model[^/]*\.safetensors(\.index\.json)?|(additional_chat_templates/.*|chat_template)\.jinja"
)


def push_to_hub(
    directory: Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    evaluation: dict[str, Any] | None = None,
    token: str | None = None,
) -> str:
    """Publish a directory that `smoothq quantize` or an export wrote, in one commit.

    Uploads the directory's files, with the model card adapted to the hub and the manifest to that
    card; the directory itself is not changed. Weights and chat templates of an earlier push that
    the directory does not have are deleted from the repo.

    Args:
        directory: a finished checkpoint.
        repo_id: `owner/name`; the repo is created if it does not exist.
        private: create a new repo as private; False leaves that to the owner's default.
        revision: an existing branch to commit to, instead of the main one.
        message: commit message, instead of the default one.
        evaluation: the parsed output of `smoothq eval --json`, for the model card.
        token: access token, instead of the one that is logged in.

    Returns:
        The URL of the repo, or of its revision.

    Raises:
        CheckpointError: for a directory that is no finished checkpoint, for an evaluation in
            another form, and for everything that the hub refuses.
    """
    if not HUB_ID.fullmatch(repo_id):
        raise CheckpointError(f"'{repo_id}' is no name of a repo; give owner/name")
    manifest = _manifest(directory)
    measured = None if evaluation is None else _evaluation(evaluation, repo_id)
    card = _card(directory / CARD, repo_id, revision, measured).encode()
    manifest.files[CARD] = hashlib.sha256(card).hexdigest()
    changed = {CARD: card, MANIFEST: manifest.model_dump_json().encode()}
    files = _files(directory)
    api = HfApi(token=token, library_name="smoothq", library_version=__version__)
    try:
        url = str(api.create_repo(repo_id, private=private or None, exist_ok=True))
        repo = api.model_info(repo_id, revision=revision)
        if private and not repo.private:
            raise CheckpointError(
                f"'{repo_id}' is there and public; make it private on the hub, or give another name"
            )
        stale = [
            sibling.rfilename
            for sibling in repo.siblings or []
            if _STALE.fullmatch(sibling.rfilename) and sibling.rfilename not in files
        ]
        # Not `upload_folder`: it splits a long upload into several commits, and until the last one
        # the repo holds one model's config beside another model's weights.
        api.create_commit(
            repo_id,
            [
                *(CommitOperationDelete(name) for name in stale),
                *(CommitOperationAdd(name, changed.get(name, files[name])) for name in files),
            ],
            commit_message=message or "Upload a model quantized with smoothq",
            revision=revision,
        )
    except CheckpointError:
        raise
    except Exception as error:  # the hub's client, its transports and Xet each raise their own
        raise CheckpointError(_refusal(error, repo_id, revision)) from error
    return url if revision is None else f"{url}/tree/{revision}"


def _manifest(directory: Path) -> Manifest:
    """The manifest of a finished checkpoint; CheckpointError for any other directory."""
    begun = Place(directory).partial.is_dir() and not (directory / "config.json").exists()
    if directory.suffix == ".partial" or begun:
        raise CheckpointError(
            f"'{directory}' is not finished; give the command that began it again to go on"
        )
    try:
        config = json.loads((directory / "config.json").read_bytes())
        quantized = "quantization_config" in config
    except (OSError, ValueError, TypeError):
        quantized = False
    if not quantized:
        raise CheckpointError(
            f"'{directory}' holds no quantized model; make one: "
            f"smoothq quantize MODEL -o {directory}"
        )
    manifest = Manifest.read(directory)
    for name in (CARD, *manifest.files):
        if not (directory / name).is_file():
            raise CheckpointError(f"{directory / name} is missing; quantize the model again")
    tensor_files(directory, str(directory))
    return manifest


def _files(directory: Path) -> dict[str, Path]:
    """The files of a directory, hidden ones excepted, by their names in the repo."""
    paths = {
        path.relative_to(directory): path for path in sorted(directory.rglob("*")) if path.is_file()
    }
    return {
        name.as_posix(): path
        for name, path in paths.items()
        if not any(part.startswith(".") for part in name.parts)
    }


def _evaluation(figures: dict[str, Any], repo_id: str) -> Evaluation:
    """The Evaluation that `Evaluation.as_dict` gave as `figures`, named after the repo."""
    try:
        return Evaluation(
            repo_id,
            None if figures["against"] is None else _public(str(figures["against"])),
            tuple(_text_result(text) for text in figures["texts"]),
            _parsed(Agreement | None, figures["decode"]),
            None if figures["tasks"] is None else _tasks(figures["tasks"]),
        )
    except (KeyError, TypeError, ValidationError) as error:
        raise CheckpointError(
            f"the evaluation is not what smoothq eval --json prints ({first_line(error)})"
        ) from error


def _text_result(figures: dict[str, Any]) -> TextResult:
    perplexity = _parsed(Perplexity, figures)
    reference = against = None
    if "reference_perplexity" in figures:
        reference = replace(perplexity, perplexity=float(figures["reference_perplexity"]))
        tokens = perplexity.windows * perplexity.sequence_length
        against = _parsed(Agreement, figures | {"tokens": tokens})
    return TextResult(_public(str(figures["text"])), perplexity, reference, against)


def _tasks(figures: list[dict[str, Any]]) -> TaskResults:
    return TaskResults(_parsed(tuple[TaskValue, ...], figures), seconds=0.0)


def _parsed(kind: Any, figures: Any) -> Any:
    return TypeAdapter(kind).validate_python(figures)


def _card(path: Path, repo_id: str, revision: str | None, measured: Evaluation | None) -> str:
    """A checkpoint's model card with the repo's name and the evaluation, without local paths."""
    try:
        card = ModelCard(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise CheckpointError(f"{path} is no model card: {first_line(error)}") from error
    argument = "" if revision is None else f', revision="{revision}"'
    flag = "" if revision is None else f" --revision {revision}"
    card.text = card.text.replace('("PATH")', f'("{repo_id}"{argument})')
    card.text = card.text.replace("serve PATH", f"serve {repo_id}{flag}")
    base = card.data.get("base_model")
    if isinstance(base, str) and not _is_of_hub(base):
        card.data.pop("base_model")
        card.text = card.text.replace(base, _public(base))
    if measured is not None:
        _add_measured(card, measured)
    return str(card)


def _add_measured(card: RepoCard, measured: Evaluation) -> None:
    """Add an evaluation to a card: a table before the loading snippet, and metadata."""
    before, loading, after = card.text.partition(LOADING)
    table = f"## Measured\n\n{measured.markdown()}"
    card.text = f"{before.rstrip()}\n\n{table}\n\n{loading}{after}"
    card.data["model_name"] = measured.model.partition("/")[2]
    card.data["eval_results"] = _results(measured)


def _results(measured: Evaluation) -> list[EvalResult]:
    texts = [
        EvalResult(
            task_type="text-generation",
            dataset_type=result.text,
            dataset_name=result.text,
            metric_type="perplexity",
            metric_value=result.perplexity.perplexity,
            metric_name=f"Perplexity, {result.perplexity.windows} windows of "
            f"{result.perplexity.sequence_length} tokens",
        )
        for result in measured.texts
    ]
    tasks = [
        EvalResult(
            task_type="text-generation",
            dataset_type=value.task,
            dataset_name=value.task,
            metric_type=value.metric,
            metric_value=value.value,
            metric_name=value.metric + ("" if value.filter == "none" else f" ({value.filter})"),
        )
        for value in (() if measured.tasks is None else measured.tasks.values)
    ]
    return texts + tasks


def _is_of_hub(name: str) -> bool:
    """Whether a model's name is a hub id and no local path."""
    return HUB_ID.fullmatch(name) is not None and not Path(name).exists()


def _public(name: str) -> str:
    """A model's or a text's name; of a local path only the last part, as the rest is private."""
    return name if _is_of_hub(name) else Path(name).name or name


def _refusal(error: Exception, repo_id: str, revision: str | None) -> str:
    """The error message for a failed push, in one line."""
    # For a single file the client wraps the server's response in another error.
    answer = next((e for e in (error, error.__cause__) if isinstance(e, HfHubHTTPError)), None)
    status = None if answer is None else answer.response.status_code
    if isinstance(answer, RevisionNotFoundError):
        return (
            f"'{repo_id}' has no revision '{revision}'; make it: "
            f"hf repos branch create {repo_id} {revision}"
        )
    if status == 401:
        return f"the hub does not know who pushes to '{repo_id}'; log in: hf auth login"
    if status == 403:
        return (
            f"you may not write to '{repo_id}'; check the name, or log in with a token that may "
            "write: hf auth login"
        )
    if status == 404:
        return f"the hub has no repo '{repo_id}' for you; check the name, or: hf auth login"
    reason = " ".join(str(error).split()) or type(error).__name__
    if isinstance(answer or error, HfHubHTTPError | ValueError):
        return f"the hub refused the push to '{repo_id}': {reason}"
    return f"the push to '{repo_id}' did not reach the hub; check the network ({reason})"
