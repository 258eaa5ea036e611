"""Models of images and text, with their processors, built in memory; an image is some colour, 28 pixels wide."""

import torch
from PIL import Image
from tiny import byte_tokenizer
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    CLIPImageProcessorPil,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessorPil,
    set_seed,
)


FAMILIES = ["llava", "qwen2_5_vl", "gemma3", "idefics3"]
_SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
_VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_TEMPLATE = (
    "{%% for m in messages %%}{{ m.role }}: {%% if m.content is string %%}{{ m.content }}{%% else %%}{%% for part in m.content %%}"
    "{%% if part.type == 'image' %%}%s{%% else %%}{{ part.text }}{%% endif %%}{%% endfor %%}{%% endif %%}<eos>\n{%% endfor %%}"
    "{%% if add_generation_prompt %%}assistant: {%% endif %%}"
)


def image(red: int, green: int = 0, size: tuple[int, int] = (28, 28)) -> Image.Image:
    """An image whose left half is red and whose right half is green."""
    picture = Image.new("RGB", size, (red, 0, 50))
    picture.paste((0, green, 200), (size[0] // 2, 0, *size))
    return picture


def make_processor(family: str) -> ProcessorMixin:
    """A processor of a family, with a tokenizer of bytes."""
    names = {
        "gemma3": {"boi_token": "<boi>", "eoi_token": "<eoi>", "image_token": "<image>"},
        "llava": {"image_token": "<image>"},
        "idefics3": {"image_token": "<image>", "fake_image_token": "<fake>", "global_image_token": "<global>"},
        "qwen2_5_vl": {"image_token": "<image>", "video_token": "<video>"},
    }[family]
    core = byte_tokenizer().backend_tokenizer
    tokens = {"pad_token": "<pad>", "eos_token": "<eos>", "extra_special_tokens": names}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **tokens)
    size = {"height": 28, "width": 28}
    if family == "gemma3":
        template = _TEMPLATE % "<boi>"
        return Gemma3Processor(Gemma3ImageProcessorPil(size=size), tokenizer, template, image_seq_length=4)
    if family == "llava":
        pictures = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=size)
        kwargs = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
        return LlavaProcessor(pictures, tokenizer, chat_template=_TEMPLATE % "<image>", **kwargs)
    if family == "idefics3":
        pictures = Idefics3ImageProcessorPil(size={"longest_edge": 28}, max_image_size={"longest_edge": 28})
        return Idefics3Processor(pictures, tokenizer, image_seq_len=4, chat_template=_TEMPLATE % "<image>")
    pictures = Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=56 * 56)
    return _QwenOfImages(pictures, tokenizer, None, chat_template=_TEMPLATE % "[<image>]")  # as it separates images


class _QwenOfImages(Qwen2_5_VLProcessor):
    """Without its processor of videos, which needs torchvision."""

    def check_argument_for_proper_class(self, argument_name, argument):
        return type(argument)


def make_vision_model(family: str, *, seed: int = 0, **kwargs) -> PreTrainedModel:
    """A model of a family, of two layers for images and two for text, which reads what `make_processor` gives."""
    tokenizer = make_processor(family).tokenizer
    tokens = {name: tokenizer.convert_tokens_to_ids(f"<{name}>") for name in ("image", "boi", "eoi", "video")}
    text = _SHAPE | {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }
    vision = _VISION | {"image_size": 28, "patch_size": 14}
    fields = {"image_token_id": tokens["image"], "tie_word_embeddings": False}
    if family == "gemma3":
        fields = {"image_token_index": tokens["image"], "mm_tokens_per_image": 4}
        fields |= {"boi_token_index": tokens["boi"], "eoi_token_index": tokens["eoi"]}
        text |= {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
    if family == "llava":
        fields = {"image_token_index": tokens["image"], "image_seq_length": 4, "vision_feature_layer": -1}
        vision |= {"model_type": "clip_vision_model", "projection_dim": 32}
        text["model_type"] = "llama"
    if family == "idefics3":
        fields |= {"scale_factor": 1}
        text["model_type"] = "llama"
    if family == "qwen2_5_vl":
        fields |= {"video_token_id": len(tokenizer) + 1, "vision_start_token_id": 0}
        vision = {"depth": 2, "hidden_size": 32, "num_heads": 4, "intermediate_size": 64, "out_hidden_size": 32}
        vision |= {"fullatt_block_indexes": [1]}
        text["rope_parameters"] = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
        text["head_dim"] = 8
    config = AutoConfig.for_model(family, text_config=text, vision_config=vision, **fields | kwargs)
    set_seed(seed)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():  # far from uniform, so that an image that is left out is seen
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.train()
