"""A checkpoint written as GGUF: our codes in llama.cpp's blocks, and refusals by name."""

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, trainers
from tokenizers import pre_tokenizers as split
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaTokenizer,
    MistralConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from smoothq import Recipe, export, preset, quantize
from smoothq.checkpoint.model_config import read_config
from smoothq.checkpoint.skeleton import skeleton_of
from smoothq.errors import CheckpointError, OutputError, RecipeError, UnsupportedModelError
from smoothq.export.gguf import export_gguf
from smoothq.export.gguf_tensors import blocks, lost_scales
from smoothq.export.gguf_tokenizer import vocabulary
from smoothq.export.reader import ExportReader
from smoothq.plan.portability import make_exportable
from smoothq.rounding.grid import QuantizedWeight, Scales

VOCABULARY = 320
TEXT = (
    "The tower is 324 metres (1,063 ft) tall, isn't it?\n\n  It's the  tallest in Paris: é 日本 😀"
)
TRAINING = ["The tower is the tallest in the city of Paris.", "It was built in 1889, wasn't it?"]
SPACE = "▁"

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "original_max_position_embeddings": 32}
CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**_COMMON, head_dim=32, tie_word_embeddings=True),
    "llama-untied": lambda: LlamaConfig(**_COMMON, tie_word_embeddings=False),
    "llama-biases": lambda: LlamaConfig(**_COMMON, attention_bias=True, mlp_bias=True),
    "llama3": lambda: LlamaConfig(**_COMMON, rope_parameters=LLAMA3),
    "mistral": lambda: MistralConfig(**_COMMON, sliding_window=48),
    "qwen2": lambda: Qwen2Config(**_COMMON, tie_word_embeddings=True),
    "qwen2-yarn": lambda: Qwen2Config(**_COMMON, rope_parameters=YARN | {"factor": 2.0}),
    # 128 is what transformers takes for granted when it reads a file.
    "qwen3": lambda: Qwen3Config(**_COMMON, head_dim=128),
}
W4 = preset("w4a16", "rtn").edit(weights__granularity="group", weights__group_size=32)
RECIPES: dict[str, Recipe] = {
    "w8": preset("w8a8", "rtn"),
    "w4-channel": preset("w4a16", "rtn").edit(weights__granularity="channel"),
    "w4-groups": W4.edit(weights__group_size="auto"),
    "w4-signed": W4.edit(weights__group_scale="multiplier"),
    "w4-zeros": W4.edit(weights__symmetric=False),
    "w4-rotated": preset("w4a16").edit(tuning=None, weights__group_size=32),
}
TOKENS = torch.randint(0, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(3))


def byte_level(
    pre_tokenizer: Any = None, normalizer: Any = None, **options: Any
) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE(**options))
    backend.pre_tokenizer = pre_tokenizer or split.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        initial_alphabet=split.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>"],
        show_progress=False,
    )
    backend.train_from_iterator(TRAINING, trainer)
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.add_tokens([AddedToken("<tool>", normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", chat_template="{{ messages }}"
    )


def sentencepiece(**more: Any) -> LlamaTokenizer:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [f"{SPACE}t", "he", f"{SPACE}the", "er", "ow", SPACE, *"theowrinsTIaPl"]
    merges = [(SPACE, "t"), ("h", "e"), (f"{SPACE}t", "he"), ("e", "r"), ("o", "w")]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    return LlamaTokenizer(vocab=vocab, merges=merges, **more)


def patterned(pattern: str) -> Any:
    whole = split.Split(Regex(pattern), "isolated")
    return split.Sequence([whole, split.ByteLevel(add_prefix_space=False, use_regex=False)])


@pytest.fixture(scope="module")
def float_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a tiny float32 model with random weights, made once."""
    made: dict[str, Path] = {}

    def of(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("float") / name
            model = AutoModelForCausalLM.from_config(CONFIGS[name]())
            numbers = torch.Generator().manual_seed(0)
            for full, parameter in model.named_parameters():
                values = torch.randn(parameter.shape, generator=numbers)
                norm = "norm" in full
                parameter.data = 1 + 0.2 * values if norm else values * parameter.shape[-1] ** -0.5
            model.save_pretrained(made[name])
            tokenizer = sentencepiece() if name == "mistral" else byte_level()
            tokenizer.save_pretrained(made[name])
        return made[name]

    return of


@pytest.fixture(scope="module")
def exported(
    tmp_path_factory: pytest.TempPathFactory, float_model: Callable[[str], Path]
) -> Callable[[str, str], tuple[Path, Path]]:
    """A checkpoint of ours and its GGUF file, made once."""
    made: dict[tuple[str, str], tuple[Path, Path]] = {}

    def of(name: str, recipe: str) -> tuple[Path, Path]:
        if (name, recipe) not in made:
            root, source = tmp_path_factory.mktemp("exported"), float_model(name)
            wanted, _ = make_exportable(skeleton_of(read_config(str(source)), ""), RECIPES[recipe])
            data = torch.randint(0, VOCABULARY, (4, 24), generator=torch.Generator().manual_seed(5))
            quantize(source, wanted, data=data, output=root / "ours", check=False)
            done = export_gguf(root / "ours", root / "model.gguf")
            assert sum(done.schemes.values()) == 7 * 2
            assert done.bytes_after == sum(t.n_bytes for t in read(root / "model.gguf").tensors)
            assert not (root / "model.gguf.partial").exists()
            made[name, recipe] = root / "ours", root / "model.gguf"
        return made[name, recipe]

    return of


@pytest.fixture
def ours(exported: Callable[[str, str], tuple[Path, Path]], tmp_path: Path) -> Path:
    """A copy of a checkpoint, to spoil."""
    return Path(shutil.copytree(exported("llama-untied", "w8")[0], tmp_path / "ours"))


def read(path: Path) -> gguf.GGUFReader:
    return gguf.GGUFReader(path)


def field(path: Path, key: str) -> Any:
    return read(path).fields[key].contents()


def decode(tensor: gguf.ReaderTensor) -> tuple[np.ndarray, np.ndarray]:
    """By the format's description: int codes (N, K), float16 scales (N, K / 32)."""
    size = {"Q8_0": 34, "Q4_0": 18, "Q4_1": 20}[tensor.tensor_type.name]
    held = np.array(tensor.data).reshape(tensor.data.shape[0], -1, size)
    scales = held[..., :2].copy().view(np.float16)[..., 0]
    if size == 34:
        return held[..., 2:].view(np.int8).reshape(len(held), -1), scales
    packed = held[..., -16:]
    nibbles = np.concatenate([packed % 16, packed // 16], -1)
    return nibbles.reshape(len(held), -1).astype(np.int64) - 8, scales


def unpaired(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows in the order that transformers has them."""
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def name_of(module: str) -> str:
    _, _, layer, _, linear = module.split(".")
    kinds = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
    kinds |= {f"{each}_proj": f"ffn_{each}" for each in ("gate", "up", "down")}
    return f"blk.{layer}.{kinds[linear]}"


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def read_back(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        *itertools.product(["llama"], ["w8", "w4-channel", "w4-signed", "w4-rotated"]),
        *itertools.product(["llama-untied"], ["w8", "w4-groups", "w4-zeros"]),
        *itertools.product(["mistral"], ["w8", "w4-zeros", "w4-rotated"]),
        *itertools.product(["qwen2"], ["w8", "w4-signed", "w4-rotated"]),
        *itertools.product(["qwen3"], ["w4-groups", "w4-zeros", "w4-rotated"]),
    ],
)
def test_transformers_reads_the_model_that_was_quantized(exported, name, recipe) -> None:
    directory, path = exported(name, recipe)
    found = read_back(path)
    weights = found.state_dict()
    for linear in ExportReader(directory, "GGUF").linears():
        expected = linear.weight.dequantize()
        # An offset of up to 16 codes is rounded too.
        loose = 0.01 * linear.weight.scales.step(torch.float32).abs().max().item()
        torch.testing.assert_close(
            *(weights[f"{linear.name}.weight"], expected),
            rtol=6e-4,
            atol=loose if recipe == "w4-zeros" else 0,
        )
    if recipe != "w8":
        expected = logits(AutoModelForCausalLM.from_pretrained(directory))
        assert (logits(found) - expected).norm() < 2e-3 * expected.norm()


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        *(("llama-biases", recipe) for recipe in RECIPES if recipe != "w4-rotated"),
        *itertools.product(["qwen2"], ["w8", "w4-signed"]),
        *itertools.product(["qwen3"], ["w4-groups", "w4-zeros"]),
    ],
)
def test_the_file_has_our_very_codes_scales_and_biases(exported, name, recipe) -> None:
    directory, path = exported(name, recipe)
    tensors = {tensor.name: tensor for tensor in read(path).tensors}
    some_negative = False
    for linear in ExportReader(directory, "GGUF").linears():
        codes, scales = decode(tensors[f"{name_of(linear.name)}.weight"])
        bias = None if linear.bias is None else tensors[f"{name_of(linear.name)}.bias"].data
        heads = {"q_proj": 4, "k_proj": 2}.get(linear.name.split(".")[-1])
        if heads and name == "llama-biases":
            codes, scales = unpaired(codes, heads), unpaired(scales, heads)
            bias = unpaired(bias, heads)
        assert np.array_equal(codes, linear.weight.codes.numpy())
        step = linear.weight.scales.step(torch.float32)
        used = scales != 0
        exact = step.repeat_interleave(scales.shape[1] // step.shape[1], 1).half().numpy()
        assert np.array_equal(scales[used], exact[used])
        some_negative |= bool((scales < 0).any())
        assert bias is None or np.array_equal(bias, linear.bias.numpy())
    assert some_negative == (recipe == "w4-signed")


@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral"])
def test_the_tokenizer_in_the_file_encodes_text_as_the_original(exported, name) -> None:
    directory, path = exported(name, "w8")
    original = AutoTokenizer.from_pretrained(directory)
    found = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for text in (TEXT, "the tower", ""):
        assert found(text).input_ids == original(text).input_ids
    assert field(path, "tokenizer.ggml.eos_token_id") == original.eos_token_id
    assert len(field(path, "tokenizer.ggml.tokens")) == VOCABULARY
    if name != "mistral":
        assert field(path, "tokenizer.chat_template") == original.chat_template
        kinds = field(path, "tokenizer.ggml.token_type")
        ids = original.convert_tokens_to_ids(["</s>", "<tool>", "Ġthe"])
        kind = gguf.TokenType
        assert [kinds[each] for each in ids] == [kind.CONTROL, kind.USER_DEFINED, kind.NORMAL]
        assert not field(path, "tokenizer.ggml.add_bos_token")


def test_a_sliding_window_bounds_the_context(exported) -> None:
    assert field(exported("mistral", "w8")[1], "llama.context_length") == 48
    assert field(exported("llama", "w8")[1], "llama.context_length") == 64


def test_scaled_positions_are_described(exported) -> None:
    _, path = exported("llama3", "w8")
    (factors,) = (each.data for each in read(path).tensors if each.name == "rope_freqs.weight")
    slowed, _ = ROPE_INIT_FUNCTIONS["llama3"](CONFIGS["llama3"](), "cpu")
    plain = 10000.0 ** -(torch.arange(8) / 8)
    assert np.allclose(factors, (plain / slowed).numpy(), rtol=1e-5)
    assert factors.max() == pytest.approx(8)
    _, path = exported("qwen2-yarn", "w8")
    scaling = {"type": "yarn", "factor": 2.0, "original_context_length": 32}
    for key, value in scaling.items():
        assert field(path, f"qwen2.rope.scaling.{key}") == value


def test_a_kept_linear_stays_as_it_was(float_model, tmp_path) -> None:
    recipe = preset("w8a8", "rtn").edit(keep=("*.0.self_attn.*",), dtype="bfloat16")
    source = float_model("llama-untied")
    quantize(source, recipe, data=TOKENS, output=tmp_path / "ours", check=False)
    export_gguf(tmp_path / "ours", tmp_path / "model.gguf")
    tensors = {tensor.name: tensor for tensor in read(tmp_path / "model.gguf").tensors}
    assert tensors["blk.0.attn_q.weight"].tensor_type.name == "BF16"
    assert tensors["blk.0.attn_norm.weight"].tensor_type.name == "F32"
    before, after = load_file(source / "model.safetensors"), read_back(tmp_path / "model.gguf")
    for linear in ("q_proj", "v_proj"):
        name = f"model.layers.0.self_attn.{linear}.weight"
        assert torch.equal(after.state_dict()[name], before[name].bfloat16().float())


def test_a_file_of_ours_is_quantized_again(exported, tmp_path) -> None:
    directory, path = exported("llama", "w4-channel")
    again = quantize(
        path.parent,
        preset("w8a8", "rtn"),
        data=TOKENS,
        gguf_file=path.name,
        output=tmp_path / "o",
        check=False,
    ).load()
    expected = logits(AutoModelForCausalLM.from_pretrained(directory))
    assert (logits(again).float() - expected).norm() < 0.05 * expected.norm()


def test_blocks_are_what_gguf_reads() -> None:
    numbers = torch.Generator().manual_seed(0)
    for bits, kind in ((4, gguf.GGMLQuantizationType.Q4_0), (8, gguf.GGMLQuantizationType.Q8_0)):
        top = 1 << (bits - 1)
        codes = torch.randint(-top, top, (6, 128), generator=numbers).to(torch.int8)
        codes[2, 32:64] = 0
        scale = torch.rand(6, 1, generator=numbers) + 0.01
        scale[2] = 1e6  # of a row whose every other block is used
        codes[2] = 0
        multiplier = torch.tensor([[1, -3]], dtype=torch.int8).expand(6, 2)
        weight = QuantizedWeight(codes, Scales(scale, multiplier))
        assert lost_scales(weight) == 0
        found = gguf.dequantize(blocks(weight, kind).numpy(), kind)
        torch.testing.assert_close(torch.from_numpy(found), weight.dequantize(), rtol=6e-4, atol=0)
        for lost in (1e6, 1e-7):
            wide = Scales(torch.full((6, 1), lost), None)
            assert lost_scales(QuantizedWeight(codes, wide)) == 5 * 4


LLAMA_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.mark.parametrize(
    ("pre", "tokenizer"),
    [
        ("gpt-2", lambda: byte_level()),
        (
            "smollm",
            lambda: byte_level(
                split.Sequence(
                    [split.Digits(individual_digits=True), split.ByteLevel(add_prefix_space=False)]
                )
            ),
        ),
        ("llama-bpe", lambda: byte_level(patterned(LLAMA_SPLIT), ignore_merges=True)),
        ("dbrx", lambda: byte_level(patterned(LLAMA_SPLIT))),
        (
            "qwen2",
            lambda: byte_level(patterned(LLAMA_SPLIT.replace("{1,3}", "")), normalizers.NFC()),
        ),
    ],
)
def test_how_text_is_split_is_known_by_name(pre, tokenizer) -> None:
    assert vocabulary(tokenizer(), VOCABULARY).pre == pre


def test_a_sentencepiece_vocabulary_has_scores_in_the_order_of_its_merges() -> None:
    found = vocabulary(sentencepiece(), VOCABULARY)
    scores = dict(zip(found.tokens, found.scores, strict=True))
    assert [scores[token] for token in (f"{SPACE}t", "he", f"{SPACE}the", "er", "ow")] == [
        *(0, -1, -2, -3, -4)
    ]
    kinds = dict(zip(found.tokens, found.types, strict=True))
    assert [kinds[token].name for token in ("<unk>", "</s>", "<0x0A>", "he", "[PAD319]")] == [
        *("UNKNOWN", "CONTROL", "BYTE", "NORMAL", "UNUSED")
    ]
    assert found.space_prefix
    assert not vocabulary(sentencepiece(add_prefix_space=False), VOCABULARY).space_prefix


def incomplete() -> PreTrainedTokenizerBase:
    spec = json.loads(sentencepiece().backend_tokenizer.to_str())
    spec["model"]["merges"].remove(["e", "r"])
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(spec)))


def without_bytes() -> PreTrainedTokenizerBase:
    spec = json.loads(sentencepiece().backend_tokenizer.to_str())
    del spec["model"]["vocab"]["<0x0A>"]
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(spec)))


def scattered() -> PreTrainedTokenizerBase:
    spec = json.loads(sentencepiece().backend_tokenizer.to_str())
    spec["model"]["vocab"] |= {f"{SPACE}th": 300, f"{SPACE}ther": 301}
    spec["model"]["merges"] += [[f"{SPACE}t", "h"], [f"{SPACE}th", "e"]]
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(spec)))


@pytest.mark.parametrize(
    ("tokenizer", "size", "message"),
    [
        (lambda: byte_level(split.Whitespace()), VOCABULARY, "no bytes of the text"),
        (lambda: byte_level(split.ByteLevel()), VOCABULARY, "no bytes of the text"),
        (lambda: byte_level(patterned(r"\w+")), VOCABULARY, r"splits text by \\w\+"),
        (lambda: byte_level(normalizer=normalizers.Lowercase()), VOCABULARY, "Lowercase"),
        (lambda: byte_level(), 100, "the model 100 rows"),
        (incomplete, VOCABULARY, "leave out a way to 'er'"),
        (without_bytes, VOCABULARY, "no token '<0x0A>'"),
        (scattered, VOCABULARY, "make '▁the' in two places"),
    ],
)
def test_another_tokenizer_is_refused(tokenizer, size, message) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        vocabulary(tokenizer(), size)


def test_another_model_than_bpe_is_refused(tokenizer) -> None:
    with pytest.raises(UnsupportedModelError, match="its model is WordLevel"):
        vocabulary(tokenizer, VOCABULARY)


def refused(directory: Path, error: type[Exception], message: str) -> None:
    """Exporting fails, and leaves nothing behind."""
    out = directory.parent / "out.gguf"
    before = set(directory.parent.iterdir())
    with pytest.raises(error, match=message):
        export_gguf(directory, out)
    assert set(directory.parent.iterdir()) == before


@pytest.mark.parametrize("name", ["gemma2", "phi3", "opt"])
def test_an_architecture_without_a_mapping_is_refused(
    float_checkpoint, data, tmp_path, name
) -> None:
    out = tmp_path / "ours"
    quantize(float_checkpoint(name), preset("w8a8", "rtn"), data=data, output=out, check=False)
    refused(tmp_path / "ours", UnsupportedModelError, f"model_type '{name}'")


def test_rows_and_groups_that_are_no_blocks_are_refused(
    float_checkpoint, float_model, data, tmp_path
) -> None:
    odd, rtn = tmp_path / "odd", preset("w8a8", "rtn")
    quantize(float_checkpoint("llama"), rtn, data=data, output=odd, check=False)
    refused(odd, RecipeError, r"q_proj.*rows of 48 are no multiple of 32")
    small = W4.edit(weights__group_size=16)
    quantize(float_model("llama"), small, data=TOKENS, output=tmp_path / "small", check=False)
    refused(tmp_path / "small", RecipeError, r"q_proj.*groups of 16.*quantize with 32")


def test_eight_bits_with_zero_points_are_refused(float_model, tmp_path) -> None:
    recipe = preset("w8a8", "rtn").edit(weights__symmetric=False, activations__bits=16)
    quantize(float_model("llama"), recipe, data=TOKENS, output=tmp_path / "ours", check=False)
    refused(tmp_path / "ours", RecipeError, "no type has 8 bits and zero points")


def test_a_recipe_that_runs_beside_the_linears_is_refused(float_model, tmp_path) -> None:
    recipe = preset("w4a4", "quarot").edit(weights__group_size=32)
    quantize(float_model("llama"), recipe, data=TOKENS, output=tmp_path / "ours", check=False)
    refused(tmp_path / "ours", RecipeError, "GGUF cannot hold")


@pytest.mark.parametrize("scale", [1e6, 1e-9])
def test_scales_beyond_float16_are_refused(ours, scale) -> None:
    path = ours / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight_scale"][5] = scale
    save_file(tensors, path, {"format": "pt"})
    refused(ours, RecipeError, r"layers.1.mlp.up_proj.*float16 does not hold 2 of its scales")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic'"),
        ({"rope_parameters": YARN | {"factor": 2.0, "beta_fast": 16}}, "'yarn' and beta_fast"),
        ({"hidden_act": "gelu"}, "activation is gelu"),
    ],
)
def test_a_config_that_llama_cpp_runs_otherwise_is_refused(ours, edit, message) -> None:
    config = json.loads((ours / "config.json").read_text())
    (ours / "config.json").write_text(json.dumps(config | edit))
    refused(ours, UnsupportedModelError, message)


def test_llama3_positions_of_another_family_are_refused(exported, tmp_path) -> None:
    ours = Path(shutil.copytree(exported("qwen3", "w8")[0], tmp_path / "ours"))
    config = json.loads((ours / "config.json").read_text())
    (ours / "config.json").write_text(json.dumps(config | {"rope_parameters": LLAMA3}))
    refused(ours, UnsupportedModelError, "'llama3'")


def test_a_bias_that_llama_cpp_has_no_place_for_is_refused(tmp_path) -> None:
    config = Qwen3Config(**_COMMON, head_dim=32, attention_bias=True)
    model = AutoModelForCausalLM.from_config(config)
    recipe = preset("w8a8", "rtn")
    quantize(model, recipe, tokenizer=byte_level(), data=TOKENS, output=tmp_path / "ours")
    refused(tmp_path / "ours", UnsupportedModelError, r"no place for '.*o_proj.bias'")


def test_a_checkpoint_without_a_tokenizer_or_an_end_is_refused(ours) -> None:
    settings = json.loads((ours / "tokenizer_config.json").read_text())
    del settings["eos_token"]
    (ours / "tokenizer_config.json").write_text(json.dumps(settings))
    config = json.loads((ours / "config.json").read_text())
    (ours / "config.json").write_text(json.dumps(config | {"eos_token_id": None}))
    refused(ours, CheckpointError, "names no token that ends a text")
    for path in ours.glob("tokenizer*"):
        path.unlink()
    refused(ours, CheckpointError, "no tokenizer")


def test_an_output_is_replaced_only_when_asked(ours, tmp_path) -> None:
    out = tmp_path / "new" / "model.gguf"
    steps: list[tuple[int, int, str]] = []
    export(ours, out, "gguf", progress=lambda *step: steps.append(step))
    assert steps == [(number, 2, "export") for number in range(2)]
    held = out.read_bytes()
    again = export_gguf(ours, out)  # it is done
    assert again.repeated
    assert out.read_bytes() == held
    export_gguf(ours, out, overwrite=True)
    assert out.read_bytes() == held
    other = tmp_path / "other.gguf"
    other.write_bytes(held[:-64])
    with pytest.raises(CheckpointError, match="exists; overwrite=True"):
        export_gguf(ours, other)
    (ours / "manifest.json").write_text((ours / "manifest.json").read_text() + " ")
    with pytest.raises(CheckpointError, match="exists; overwrite=True"):
        export_gguf(ours, out)
    with pytest.raises(CheckpointError, match="is a directory"):
        export_gguf(ours, tmp_path, overwrite=True)
    with pytest.raises(OutputError, match="cannot write"):
        export_gguf(ours, out / "below.gguf")
    assert list(out.parent.iterdir()) == [out]
