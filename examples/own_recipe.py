"""A recipe of one's own: mixed precision, one layer in float, stopped early where it goes wrong.

    python examples/own_recipe.py MODEL OUT

Writes recipe.yaml beside OUT, for `smoothq quantize MODEL --recipe recipe.yaml -o OUT`.
"""

import sys
from pathlib import Path

from transformers import AutoTokenizer

from smoothq import BlockDone, Probe, TextSource, evaluation_tokens, preset, quantize

model, out = sys.argv[1], Path(sys.argv[2])
recipe = preset("w8a8").edit(
    name="eight-and-four",
    keep=["*.layers.0.self_attn.o_proj"],
    overrides=[{"match": "*.mlp.*_proj", "weights": {"bits": 4, "clip": True}}],
    calibration__source="builtin",
    calibration__samples=8,
    calibration__sequence_length=256,
)
(out.parent / "recipe.yaml").write_text(recipe.to_yaml())

text = evaluation_tokens(AutoTokenizer.from_pretrained(model), TextSource("builtin"))
probe = Probe(text[0, : 2 * 256].view(2, 256), every=2)


def watch(done: BlockDone) -> None:
    """Print what the blocks so far have cost."""
    if done.perplexity is None or done.float_perplexity is None:
        return
    ratio = done.perplexity / done.float_perplexity
    print(f"block {done.block}: perplexity {done.perplexity:.2f}, {ratio:.2f} times float")
    if ratio > 2:
        raise RuntimeError("this recipe is too coarse")


quantize(model, recipe, output=out, probe=probe, on_block=watch)
