"""Quantize a model that is in memory, calibrated on tokens of your own.

    python examples/model_in_memory.py MODEL

The model stays as it is; the quantized one is another. Nothing is left on the disk.
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

from smoothq import preset, quantize

model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])

text = "Calibrate on text like that which the model will meet. " * 200
tokens = tokenizer(text, return_tensors="pt").input_ids[0, : 8 * 64].view(8, 64)

quantized = quantize(model, preset("w8a8"), tokenizer, data=tokens)
print(quantized)
print(f"{model.get_memory_footprint():,} bytes before, {quantized.get_memory_footprint():,} after")
