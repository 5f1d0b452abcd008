"""Opens a float model: of a directory, the hub, a GGUF file, or in memory."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..compat import is_custom_class
from ..data.tokenizer import Processor, load_tokenizer
from ..errors import CheckpointError, needs_package
from .checkpoint_source import CheckpointSource
from .formats.choose import refuse_loaded
from .hub_files import resolve_directory
from .in_memory import unwrapped
from .module_source import ModuleSource
from .side_files import SideFiles, is_legal
from .source import Source


def open_source(
    model: str | Path | PreTrainedModel,
    tokenizer: Processor | None = None,
    gguf_file: str | None = None,
    trust_remote_code: bool = False,
) -> Source:
    """Open a model as a float one: by hub id or directory, of a GGUF file in either, or in memory.

    Weights in a directory that are quantized already are decoded while they are read.

    Args:
        model: hub id, `hf://owner/name[@revision]`, directory, GGUF file, or model.
        tokenizer: of a model in memory, or its processor; others bring their own.
        gguf_file: name of a GGUF file in `model`, which is dequantized to bfloat16.
        trust_remote_code: whether to run code beside the model.

    Raises:
        CheckpointError: if there is no such model, or it cannot be read.
        UnsupportedModelError: for a model that is quantized already in a way that is not decoded,
            or not supported.
    """
    if not isinstance(model, str | Path):
        model = unwrapped(model)
        refuse_loaded(model.config, type(model).__name__)
        read = model.config.name_or_path
        paths = [Path(read)] if read and Path(read).is_dir() else []
        code = {}
        if is_custom_class(type(model)) and paths:  # it is loaded again by the files beside it
            beside = SideFiles.of(paths[0]).files.items()
            code = {name: path for name, path in beside if path.suffix == ".py"}
        return ModuleSource(model, tokenizer, read or type(model).__name__, paths, code)
    if gguf_file is not None:
        return _open_gguf(str(model), gguf_file)
    directory = resolve_directory(str(model))
    return CheckpointSource(directory, str(model), trust_remote_code, decodes=True)


def _open_gguf(model: str, gguf_file: str) -> Source:
    directory = resolve_directory(model) if not Path(model).is_file() else Path(model).parent
    if not (directory / gguf_file).is_file():
        raise CheckpointError(f"{directory} has no GGUF file '{gguf_file}'")
    needs_package("gguf", "gguf")
    try:
        tokenizer = load_tokenizer(directory, gguf_file, gguf_file)
        float_model = AutoModelForCausalLM.from_pretrained(
            directory, gguf_file=gguf_file, dtype=torch.float32, trust_remote_code=False
        )
    except (ValueError, KeyError, OSError) as error:
        raise CheckpointError(f"{gguf_file}: transformers cannot read it: {error}") from error
    # transformers has dequantized it to float32, a dtype that few models need.
    del float_model.config.quantization_config
    float_model.config.dtype = torch.bfloat16
    beside = SideFiles.of(directory).files.items()
    return ModuleSource(
        float_model,
        tokenizer,
        gguf_file,
        paths=[directory, directory / gguf_file],
        files={name: path for name, path in beside if is_legal(name)},
        dtype=torch.bfloat16,
    )
