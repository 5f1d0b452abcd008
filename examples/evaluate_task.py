"""Measure a model on a task of one's own, by lm-eval, and on text.

    python examples/evaluate_task.py MODEL

A task is a YAML file as lm-eval has it; this one asks for capitals.
"""

import json
import sys
import tempfile
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from smoothq import evaluate

QUESTIONS = [("France", "Paris"), ("Italy", "Rome"), ("Japan", "Tokyo"), ("Egypt", "Cairo")]
CAPITALS = [capital for _, capital in QUESTIONS]
TASK = """
task: capitals
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "The capital of {{{{country}}}} is"
doc_to_choice: {choices}
doc_to_target: "{{{{capital}}}}"
metric_list: [{{metric: acc}}]
"""

model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
with tempfile.TemporaryDirectory() as scratch:
    data, task = Path(scratch) / "capitals.jsonl", Path(scratch) / "capitals.yaml"
    rows = [{"country": country, "capital": capital} for country, capital in QUESTIONS]
    data.write_text("\n".join(json.dumps(row) for row in rows))
    task.write_text(TASK.format(data=data, choices=json.dumps(CAPITALS)))
    evaluation = evaluate(
        model,
        tokenizer,
        text="builtin",
        windows=2,
        sequence_length=256,
        tasks=[str(task)],
    )
print(evaluation.markdown())
