"""Tasks of EleutherAI's lm-evaluation-harness (lm-eval), on a model in memory.

lm-eval is optional and takes seconds to import: it is imported when a task is run.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import CalibrationError, SmoothqError, first_line


@dataclass(frozen=True)
class TaskValue:
    """One metric of a task or of a group of tasks, as lm-eval computes it.

    Attributes:
        task: name of the task or the group.
        metric: name of the metric, such as `acc`.
        filter: lm-eval's filter for the model's answers before scoring; usually `none`.
        value: the metric.
        stderr: its standard error, None where lm-eval has none.
        higher_is_better: None where lm-eval does not say, or the tasks of a group differ.
        samples: documents that were scored.
    """

    task: str
    metric: str
    filter: str
    value: float
    stderr: float | None
    higher_is_better: bool | None
    samples: int


@dataclass(frozen=True)
class TaskResults:
    """Results of a run of tasks.

    Attributes:
        values: every metric that is a number, in lm-eval's order: tasks, then groups.
        seconds: wall-clock time of the whole run, reading the data included.
    """

    values: tuple[TaskValue, ...]
    seconds: float


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    include_path: Path | None = None,
    *,
    limit: int | None = None,
    batch_size: int = 1,
    max_length: int | None = None,
    num_fewshot: int | None = None,
) -> TaskResults:
    """Run tasks by `lm_eval.simple_evaluate`, and return its figures to the last digit.

    The model runs in eval mode and gets its mode back. lm-eval seeds the generators of random,
    numpy and torch, and gives a tokenizer without a padding token one.

    Args:
        model: a causal LM, float or quantized.
        tokenizer: the model's.
        tasks: names of tasks, groups and tags, or task files that end in .yaml. A file brings all
            task files below its directory with it. Relative data paths in a task file are relative
            to the working directory, as everywhere in lm-eval; a function named by
            `custom_dataset` can look beside itself.
        include_path: a directory of more task files, which take precedence over lm-eval's tasks of
            the same name.
        limit: documents of each task, from the start; None for all.
        batch_size: requests a forward.
        max_length: tokens a request; None for the model's limit.
        num_fewshot: examples in a prompt, None for each task's default.

    Raises:
        CalibrationError: lm-eval is not installed or refuses, a task is unknown, a task or data
            set cannot be loaded, or a number is out of range.
    """
    if not tasks:
        raise CalibrationError("no task is named: give a task's name or a .yaml task file")
    for name, number, least in (
        ("limit", limit, 1),
        ("batch_size", batch_size, 1),
        ("max_length", max_length, 2),
        ("num_fewshot", num_fewshot, 0),
    ):
        if number is not None and number < least:
            raise CalibrationError(f"tasks cannot run with {name} {number}: it is {least} or more")
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise CalibrationError(
            f"tasks need lm-eval, which cannot be imported ({error}): pip install 'smoothq[eval]'"
        ) from error
    start = time.perf_counter()
    manager, names = _find(tasks, include_path)
    loaded = [item for name in names for item in _load(manager, name)]
    was_training = model.training
    try:
        outcome = simple_evaluate(
            model=HFLM(model, tokenizer=tokenizer, batch_size=batch_size, max_length=max_length),
            tasks=loaded,
            task_manager=manager,
            limit=limit,
            num_fewshot=num_fewshot,
            log_samples=False,
        )
    except SmoothqError:
        raise
    except Exception as error:  # of the tasks' code, the model's or its tokenizer's
        reason = first_line(error)
        raise CalibrationError(f"lm-eval cannot run {', '.join(names)}: {reason}") from error
    finally:
        model.train(was_training)
    return TaskResults(tuple(_values(outcome)), time.perf_counter() - start)


def _find(tasks: Sequence[str], include_path: Path | None) -> tuple[Any, list[str]]:
    """An lm-eval TaskManager that knows all requested tasks, and their names in it."""
    from lm_eval.tasks import TaskManager

    files = {task: Path(task).expanduser().absolute() for task in tasks if task.endswith(".yaml")}
    folders = _folders(files, include_path)
    manager = TaskManager(include_path=folders, include_defaults=False)
    by_file = {entry.yaml_path: name for name, entry in manager.task_index.items()}
    names = []
    for task in tasks:
        name = by_file.get(files[task]) if task in files else task
        if name is None:
            raise CalibrationError(
                f"lm-eval finds no task in '{task}': it must be YAML with a `task:` or `group:` "
                "that no other task file beside it has"
            )
        names.append(name)
    # Reading all of lm-eval's own task files takes seconds.
    if not all(_is_whole(name, manager.task_index) for name in names):
        manager = TaskManager(include_path=folders)
    for name in names:
        if name not in manager.task_index:
            places = ", ".join(["lm-eval's own tasks", *(f"'{folder}'" for folder in folders)])
            raise CalibrationError(
                f"no task or group '{name}' in {places}: `lm-eval ls tasks` lists lm-eval's own, "
                "a .yaml file or an include path adds others"
            )
    return manager, names


def _folders(files: dict[str, Path], include_path: Path | None) -> list[Path]:
    """The directories with task files: `include_path`, and those of the files outside of it.

    files: by the task that names one. Raises CalibrationError for a path that is not there.
    """
    folders = []
    if include_path is not None:
        folders.append(include_path.expanduser().absolute())
        if not folders[0].is_dir():
            raise CalibrationError(f"no directory '{include_path}' to look for tasks in")
    for task, file in files.items():
        if not file.is_file():
            raise CalibrationError(f"no task file '{task}': give an existing one, or a task's name")
        if not any(file.is_relative_to(folder) for folder in folders):
            folders.append(file.parent)
    return folders


def _is_whole(name: str, index: dict[str, Any]) -> bool:
    """Whether a task, or a group with all its members, is in a TaskManager's index."""
    if name not in index:
        return False
    config = index[name].cfg or {}  # a tag has none
    members = config.get("task") if "group" in config else None
    if not isinstance(members, list):
        return True
    named = (
        item.get("group") or item.get("task", "") if isinstance(item, dict) else item
        for item in members
    )
    return all(_is_whole(member, index) for member in named)


def _load(manager: Any, name: str) -> list[Any]:
    """The group of that name, or the task, or the tasks of the tag, with their data."""
    try:
        loaded = manager.load([name])
    except Exception as error:  # datasets, the hub's client, Jinja and task files' own functions
        raise _unloadable(manager.task_index[name], error) from error
    groups: dict[str, Any] = loaded["groups"]
    return [groups[name]] if name in groups else list(loaded["tasks"].values())


def _unloadable(entry: Any, error: Exception) -> CalibrationError:
    """The error for a task (lm-eval's Entry) whose file or data could not be read."""
    reason = f"{type(error).__name__}: {first_line(error)}"
    data = (entry.cfg or {}).get("dataset_path")
    task = f"'{entry.name}' with data set '{data}'" if data else f"'{entry.name}'"
    if isinstance(error, ConnectionError | TimeoutError):
        return CalibrationError(
            f"the Hugging Face hub cannot be reached for task {task} ({reason}): "
            "download it once where there is a network, or give a task file with local data"
        )
    return CalibrationError(
        f"cannot load task {task} ({reason}): check {entry.yaml_path or 'its task files'}, "
        "the data, and what else the task needs"
    )


def _values(outcome: dict[str, Any]) -> Iterator[TaskValue]:
    """The numeric metrics in what `simple_evaluate` returns."""
    for task, figures in outcome["results"].items():
        better = outcome["higher_is_better"].get(task, {})
        for key, value in figures.items():
            metric, comma, answers = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, Real):
                continue
            stderr = figures.get(f"{metric}_stderr,{answers}")
            yield TaskValue(
                task=task,
                metric=metric,
                filter=answers,
                value=float(value),
                stderr=float(stderr) if isinstance(stderr, Real) else None,
                higher_is_better=better.get(metric),
                samples=figures.get("sample_count", {}).get(key, figures["sample_len"]),
            )
