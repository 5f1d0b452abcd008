"""Tasks of lm-eval: the same figures by every door, and one line for whatever goes wrong."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import smoothq
from smoothq.errors import CalibrationError, CheckpointError, DeviceError
from smoothq.evaluation.load import load_model
from smoothq.evaluation.tasks import TaskResults, TaskValue, run_tasks
from tests.conftest import RECIPES

pytest.importorskip("lm_eval")

TASKS = ["colours", "prose"]
CHOICE = """
task: colours
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""
ROLLING = """
task: prose
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: word_perplexity
  - metric: bits_per_byte
"""
GROUP = """
group: both
task: [colours, prose]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks and a group of them, with data of their own."""
    folder = tmp_path_factory.mktemp("tasks")
    questions = [
        {"question": f"The {thing} is", "choices": [" red", " green", " blue"], "answer": i % 3}
        for i, thing in enumerate(("sky", "grass", "rose", "sea", "leaf", "blood", "night"))
    ]
    texts = [{"text": "A text of some length, longer than one window. " * n} for n in (1, 2, 5)]
    for name, text, rows in (("colours", CHOICE, questions), ("prose", ROLLING, texts)):
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / f"{name}.yaml").write_text(text.format(data=data))
    (folder / "both.yaml").write_text(GROUP)
    return folder


@pytest.fixture(scope="module")
def loaded(
    float_checkpoint: Callable[[str], Path],
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The tiny float model and its tokenizer."""
    return load_model(str(float_checkpoint("llama")))


@pytest.fixture(scope="module")
def quantized(
    float_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("quantized") / "out"
    smoothq.quantize(float_checkpoint("llama"), RECIPES["w8a8-rtn"], output=out)
    return out


def figures(results: TaskResults) -> dict[tuple[str, str], float]:
    return {(value.task, value.metric): value.value for value in results.values}


def lm_eval_figures(results: dict[str, Any]) -> dict[tuple[str, str], float]:
    return {
        (task, key.partition(",")[0]): value
        for task, values in results.items()
        for key, value in values.items()
        if "," in key and "_stderr" not in key
    }


def run_python(*command: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, *map(str, command)]
    return subprocess.run(line, capture_output=True, text=True, check=False)


def test_figures_are_those_of_lm_eval_on_its_own(loaded, float_checkpoint, folder) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    expected = simple_evaluate(
        model="hf",
        model_args={"pretrained": str(float_checkpoint("llama")), "dtype": "float32"},
        device="cpu",
        batch_size=2,
        tasks=TASKS,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
    )["results"]
    results = run_tasks(*loaded, TASKS, folder, batch_size=2)
    assert figures(results) == lm_eval_figures(expected)
    first = results.values[0]
    stderr = expected["colours"]["acc_stderr,none"]
    assert first == TaskValue("colours", "acc", "none", first.value, stderr, True, 7)
    last = results.values[-1]
    assert (last.metric, last.stderr, last.higher_is_better) == ("bits_per_byte", None, False)
    assert last.samples == 3


def test_files_and_groups_are_tasks(loaded, folder) -> None:
    by_name = run_tasks(*loaded, TASKS, folder)
    for tasks in ([f"{folder}/colours.yaml", "prose"], ["both"], [f"{folder}/both.yaml"]):
        include = folder if tasks == ["both"] else None
        assert run_tasks(*loaded, tasks, include).values == by_name.values


def test_limit_length_shots_and_mode(loaded, folder) -> None:
    model, tokenizer = loaded
    model.train()
    two = run_tasks(model, tokenizer, ["colours"], folder, limit=2, num_fewshot=1)
    assert model.training
    model.eval()
    assert {value.samples for value in two.values} == {2}
    whole = figures(run_tasks(model, tokenizer, ["prose"], folder))
    assert figures(run_tasks(model, tokenizer, ["prose"], folder, max_length=16)) != whole


def test_a_quantized_model_as_lm_evals_model_smoothq(quantized, folder) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    outcome = simple_evaluate(
        model="smoothq",
        model_args={"pretrained": str(quantized)},
        device="cpu",
        tasks=TASKS,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
    )
    expected = figures(run_tasks(*load_model(str(quantized)), TASKS, folder))
    assert lm_eval_figures(outcome["results"]) == expected


# One process for what needs one of its own: importing lm-eval takes longest. Its commands are those
# of `python -m smoothq.lm_eval`, where lm-eval finds its own tasks in a folder without any: there
# are thousands, read at every start.
OUTSIDE = """
import json, sys, smoothq, lm_eval
from lm_eval.tasks import TaskManager
quantized, folder, none, commands = map(json.loads, sys.argv[1:])
outcome = lm_eval.simple_evaluate(
    model="smoothq",
    model_args={"pretrained": quantized, "memory": "low"},
    tasks=["colours"],
    task_manager=TaskManager(include_path=folder, include_defaults=False),
    device="cpu",
    limit=3,
)
exits = {}
import runpy
from lm_eval.tasks import manager
manager.__file__ = none + "/manager.py"
for name, command in commands.items():
    sys.argv = ["smoothq.lm_eval", *command]
    try:
        runpy.run_module("smoothq.lm_eval", run_name="__main__")
        exits[name] = None
    except SystemExit as stop:
        exits[name] = stop.code
print(json.dumps({"accuracy": outcome["results"]["colours"]["acc,none"], "exits": exits}))
"""


@pytest.fixture(scope="module")
def outside(quantized, folder, tmp_path_factory) -> tuple[dict[str, Any], Path]:
    """What OUTSIDE prints, and the directory that its commands write to."""
    directory = tmp_path_factory.mktemp("outside")
    (directory / "none").mkdir()
    common = ("run", "--device", "cpu", "--include_path", str(folder))
    commands = {
        model: [
            *(*common, "--model", model, "--model_args", f"pretrained={quantized},dtype=float32"),
            *("--tasks", ",".join(TASKS), "--output_path", f"{directory}/{model}/results.json"),
        ]
        for model in ("smoothq", "hf")
    }
    nowhere = ("--model", "smoothq", "--model_args", "pretrained=./nowhere", "--tasks", "colours")
    commands["nowhere"] = [*common, *nowhere]
    given = (str(quantized), str(folder), str(directory / "none"), commands)
    result = run_python("-c", OUTSIDE, *map(json.dumps, given))
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    return json.loads(result.stdout.splitlines()[-1]), directory


@pytest.mark.slow
def test_importing_smoothq_is_enough(quantized, folder, outside) -> None:
    expected = run_tasks(*load_model(str(quantized)), ["colours"], folder, limit=3)
    assert outside[0]["accuracy"] == expected.values[0].value


@pytest.mark.slow
@pytest.mark.parametrize("model", ["smoothq", "hf"])
def test_the_command_line_of_lm_eval(quantized, folder, outside, model) -> None:
    ended, directory = outside
    assert ended["exits"][model] in (None, 0)
    written = json.loads(next((directory / model).rglob("results*.json")).read_text())
    expected = figures(run_tasks(*load_model(str(quantized)), TASKS, folder))
    assert lm_eval_figures(written["results"]) == expected


@pytest.mark.slow
def test_an_error_on_the_command_line_is_one_line(outside) -> None:
    message = outside[0]["exits"]["nowhere"]  # a text is printed to stderr, for exit code 1
    assert message.startswith("smoothq: model './nowhere' is not a dir")
    assert "\n" not in message


@pytest.mark.slow
def test_importing_smoothq_does_not_import_lm_eval() -> None:
    result = run_python(
        "-c",
        "import os, sys; os.environ.pop('HF_XET_HIGH_PERFORMANCE', None); import smoothq\n"
        "print(*(name for name in sys.modules if name.partition('.')[0] == 'lm_eval'))\n"
        "print(os.environ.get('HF_XET_HIGH_PERFORMANCE'))\n",
    )
    assert result.stdout.splitlines() == ["", "None"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "order",
    [
        "smoothq, lm_eval.models",
        "lm_eval.models, smoothq",
        "lm_eval, smoothq, lm_eval.models",
    ],
)
def test_lm_eval_knows_smoothq_in_either_order_of_imports(order: str) -> None:
    result = run_python(
        "-c",
        f"import {order}\n"
        "from lm_eval.api.registry import model_registry\n"
        "print('smoothq' in model_registry)\n",
    )
    assert result.stdout.split() == ["True"]


def test_without_lm_eval_smoothq_works_and_says_what_to_install(
    loaded, folder, monkeypatch
) -> None:
    from smoothq.integrations.register import register

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    for name in [name for name in sys.modules if name.startswith("lm_eval.")]:
        monkeypatch.delitem(sys.modules, name)
    register()
    with pytest.raises(CalibrationError, match=r"pip install 'smoothq\[eval\]'"):
        run_tasks(*loaded, TASKS, folder)


def test_what_is_not_there_is_named(loaded, folder, tmp_path) -> None:
    (tmp_path / "broken.yaml").write_text("task: [")
    (tmp_path / "local.yaml").write_text(CHOICE.format(data="nowhere.jsonl"))
    for tasks, include, message in (
        ([], folder, "no task is named"),
        (["./no.yaml"], None, "no task file './no.yaml'"),
        (TASKS, tmp_path / "no", "no directory '.*/no'"),
        ([str(tmp_path / "broken.yaml")], None, "no task in '.*broken.yaml'"),
        ([str(tmp_path / "local.yaml")], None, "'colours' .*nowhere.jsonl.*local.yaml"),
    ):
        with pytest.raises(CalibrationError, match=message) as caught:
            run_tasks(*loaded, tasks, include)
        assert "\n" not in str(caught.value)


def test_data_out_of_reach_is_named(loaded, tmp_path, monkeypatch) -> None:
    def unreachable(path: str, **_: object) -> None:
        raise ConnectionError(f"Couldn't reach '{path}' on the Hub\nand more")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    file = tmp_path / "colours.yaml"
    file.write_text(CHOICE.format(data="x").replace("json", "owner/name", 1))
    with pytest.raises(CalibrationError) as caught:
        run_tasks(*loaded, [str(file)])
    message = str(caught.value)
    assert "hub cannot be reached for task 'colours' with data set 'owner/name'" in message
    assert "\n" not in message


@pytest.mark.slow
def test_an_unknown_task_is_named_with_the_places_looked_in(
    loaded, folder, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr("lm_eval.tasks.manager.__file__", str(tmp_path / "manager.py"))
    with pytest.raises(CalibrationError, match="no task or group 'no-such'") as caught:
        run_tasks(*loaded, ["colours", "no-such"], folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    "number", [{"limit": 0}, {"batch_size": 0}, {"max_length": 1}, {"num_fewshot": -1}]
)
def test_numbers_out_of_range_are_refused(loaded, folder, number) -> None:
    with pytest.raises(CalibrationError, match=next(iter(number))):
        run_tasks(*loaded, TASKS, folder, **number)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"revision": "main"}, CheckpointError, "no revision"),
        ({"dtype": "int8"}, CheckpointError, "no dtype 'int8'"),
        ({"memory": "none"}, CheckpointError, "no memory 'none'"),
        ({"device": "mps"}, DeviceError, "mps"),
        ({"pretrained": "./nowhere"}, CheckpointError, "nowhere"),
    ],
)
def test_the_model_refuses_what_it_would_not_heed(quantized, arguments, error, message) -> None:
    from lm_eval.api.registry import get_model

    with pytest.raises(error, match=message):
        get_model("smoothq").create_from_arg_obj({"pretrained": str(quantized)} | arguments)
