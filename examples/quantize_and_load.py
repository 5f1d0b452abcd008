"""Quantize a model and load it again.

    python examples/quantize_and_load.py MODEL OUT

MODEL is a directory or a hub id. Calibration text comes with Python.
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

from smoothq import preset, quantize

model, out = sys.argv[1:]
recipe = preset("w8a8").edit(calibration__source="builtin", calibration__samples=8)
print(quantize(model, recipe, output=out))

loaded = AutoModelForCausalLM.from_pretrained(out)
tokenizer = AutoTokenizer.from_pretrained(out)
prompt = tokenizer("The capital of France is", return_tensors="pt")
print(tokenizer.decode(loaded.generate(**prompt, max_new_tokens=16, do_sample=False)[0]))
