"""Processors of images that need Pillow alone, and chats with images, for `tiny_classes`."""

import string
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import (
    LlavaProcessor,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLProcessor,
    Qwen3VLProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tests.tiny_models import VOCABULARY

VISION = ["llava", "qwen2_5_vl", "qwen3_vl"]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] }}"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for p in m['content'] %}"
    "{% if p['type'] == 'image' %}IMAGE{% else %}{{ p['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{% endfor %}"
)


class _WithoutVideo:
    """The processor's video part needs torchvision, which these tests do without."""

    @classmethod
    def get_attributes(cls) -> list[str]:
        return ["image_processor", "tokenizer"]


class Qwen2_5Images(_WithoutVideo, Qwen2_5_VLProcessor):
    """Qwen2.5-VL's processor of images and text."""


class Qwen3Images(_WithoutVideo, Qwen3VLProcessor):
    """Qwen3-VL's processor of images and text."""


def image_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character; the last three stand for video, and pieces of images."""
    words = ["<s>", "</s>", *string.printable[:91], "<end>", "<begin>", "<video>", "<image>"]
    assert len(words) == VOCABULARY
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<s>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        extra_special_tokens={"image_token": "<image>", "video_token": "<video>"},
    )


def processor_of(name: str) -> ProcessorMixin:
    """A processor for a model of `VISION`."""
    tokenizer = image_tokenizer()
    if name == "llava":
        size = {"height": 28, "width": 28}
        return LlavaProcessor(
            CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=size),
            tokenizer,
            patch_size=14,
            vision_feature_select_strategy="default",
            image_token="<image>",
            num_additional_image_tokens=1,
            chat_template=TEMPLATE.replace("IMAGE", "<image>"),
        )
    kind: Any = Qwen2_5Images if name == "qwen2_5_vl" else Qwen3Images
    images = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, min_pixels=64, max_pixels=400)
    template = TEMPLATE.replace("IMAGE", "<begin><image><end>")
    return kind(images, tokenizer, None, chat_template=template)


def picture(seed: int, size: tuple[int, int] = (30, 20)) -> Image.Image:
    """An image of noise."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def pictures(folder: Path, count: int = 2) -> list[Path]:
    """Image files, each of another shape."""
    paths = [folder / f"{number}.png" for number in range(count)]
    for number, path in enumerate(paths):
        picture(number, (30 - 10 * (number % 2), 20 + 4 * number)).save(path)
    return paths


def chat(image: Any, text: str = "what is this", key: str = "path") -> list[dict[str, Any]]:
    """A chat about an image, which is named by `key`."""
    source = {} if image is None else {key: image if key == "image" else str(image)}
    return [
        {"role": "system", "content": "be short"},
        {
            "role": "user",
            "content": [{"type": "image", **source}, {"type": "text", "text": text}],
        },
        {"role": "assistant", "content": "noise"},
    ]


def batch_for(name: str, image: Any, text: str = "what is this") -> dict[str, torch.Tensor]:
    """What a processor makes of a chat about an image."""
    made = processor_of(name).apply_chat_template(
        chat(image, text, "image"), tokenize=True, return_dict=True, return_tensors="pt"
    )
    return dict(made)
