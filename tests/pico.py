"""Vision-language models of a few thousand parameters: the real Hugging Face classes, built in memory in milliseconds.

Every model shares one tokenizer (about 400 byte-level tokens), one chat template and one tiny text configuration, so a
test that passes for one family and fails for another says something about the family. Nothing is downloaded. The
weights are random: these models are for shapes, gradients and files, not for answers.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torchvision_shim  # noqa: F401  (before transformers looks for torchvision)
import transformers as hf
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

Built = tuple[hf.PreTrainedModel, hf.ProcessorMixin]

# --- one tokenizer, one chat template, one text model ---------------------------------------------------------------

COLORS = {"red": (220, 40, 40), "green": (40, 160, 60), "blue": (50, 70, 210), "yellow": (235, 200, 50)}
SHAPES = ("square", "circle")
SIDES = ("left", "right")
QUESTIONS = {
    "color": "What color is the shape?",
    "shape": "Is it a square or a circle?",
    "side": "Is the shape on the left or on the right?",
}

CHAT = """\
{%- for message in messages -%}
{{ '<bos>' + message['role'] + '\\n' }}
{%- if message['role'] == 'assistant' -%}
{% generation %}
{%- if message['content'] is string -%}{{ message['content'] }}
{%- else -%}{%- for part in message['content'] -%}{{ part['text'] }}{%- endfor -%}{%- endif -%}
{{ '<eos>' }}
{%- endgeneration -%}
{%- elif message['content'] is string -%}{{ message['content'] + '<eos>' }}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{{ 'IMAGE' }}{%- else -%}{{ part['text'] }}{%- endif -%}
{%- endfor -%}
{{ '<eos>' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<bos>assistant\\n' }}{%- endif -%}
"""

TEXT = {
    "vocab_size": 420,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
SIDE = {"height": 28, "width": 28}
PINPOINTS = [[28, 56], [56, 28], [56, 56]]


def tokenizer(special: Sequence[str] = (), image: str = "", **named: str) -> hf.PreTrainedTokenizerFast:
    """A byte-level BPE of at most 400 tokens, trained on the questions above.

    Args:
        special: a family's own special tokens.
        image: what the chat template writes where a picture stands.
        named: special tokens that the family's processor asks for by name (``image_token="<image>"``).
    """
    bpe = Tokenizer(BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<unk>", "<pad>", "<bos>", "<eos>", *special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = [*QUESTIONS.values(), " ".join([*COLORS, *SHAPES, *SIDES, "system user assistant yes no"])]
    bpe.train_from_iterator(words * 4, trainer)
    built = hf.PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        padding_side="left",
        extra_special_tokens=named,
    )
    built.chat_template = CHAT.replace("IMAGE", image)
    return built


# --- the families ---------------------------------------------------------------------------------------------------


def llava() -> Built:
    """CLIP tower, two-layer projector, Llama."""
    tok = tokenizer(["<image>"], "<image>", image_token="<image>")
    config = hf.LlavaConfig(
        text_config=hf.LlamaConfig(**TEXT),
        vision_config=hf.CLIPVisionConfig(**VISION, projection_dim=32),
        image_token_index=tok.convert_tokens_to_ids("<image>"),
    )
    processor = hf.LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=SIDE),
        tok,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tok.chat_template,
    )
    return hf.LlavaForConditionalGeneration(config), processor


def llava_next() -> Built:
    """As LLaVA, with a picture cut into tiles."""
    tok = tokenizer(["<image>"], "<image>", image_token="<image>")
    config = hf.LlavaNextConfig(
        text_config=hf.LlamaConfig(**TEXT),
        vision_config=hf.CLIPVisionConfig(**VISION, projection_dim=32),
        image_token_index=tok.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=PINPOINTS,
    )
    processor = hf.LlavaNextProcessor(
        LlavaNextImageProcessorPil(size={"shortest_edge": 28}, crop_size=SIDE, image_grid_pinpoints=PINPOINTS),
        tok,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tok.chat_template,
    )
    return hf.LlavaNextForConditionalGeneration(config), processor


def idefics3() -> Built:
    """SigLIP-like tower, pixel shuffle and one linear layer, Llama; ``model.text_model`` is its language model."""
    tok = tokenizer(["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"], "<image>")
    config = hf.Idefics3Config(
        text_config=hf.LlamaConfig(**TEXT),
        vision_config=VISION,
        image_token_id=tok.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=TEXT["pad_token_id"],
    )
    images = Idefics3ImageProcessorPil(
        size={"longest_edge": 56}, max_image_size={"longest_edge": 28}, do_image_splitting=False
    )
    processor = hf.Idefics3Processor(images, tok, image_seq_len=1, chat_template=tok.chat_template)
    return hf.Idefics3ForConditionalGeneration(config), processor


def gemma3() -> Built:
    """SigLIP tower, pooled projector, Gemma with sliding-window layers."""
    names = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    tok = tokenizer(list(names.values()), "<start_of_image>", **names)
    ids = {name: tok.convert_tokens_to_ids(token) for name, token in names.items()}
    config = hf.Gemma3Config(
        text_config={**TEXT, "head_dim": 8, "sliding_window": 64},
        vision_config={**VISION, "patch_size": 7, "vision_use_head": False},
        mm_tokens_per_image=4,
        boi_token_index=ids["boi_token"],
        eoi_token_index=ids["eoi_token"],
        image_token_index=ids["image_token"],
    )
    images = Gemma3ImageProcessorPil(size=SIDE)
    processor = hf.Gemma3Processor(images, tok, image_seq_length=4, chat_template=tok.chat_template)
    model = hf.Gemma3ForConditionalGeneration(config)
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.2)  # zero in a fresh one
    return model, processor


def paligemma() -> Built:
    """SigLIP tower and one linear layer, Gemma, which reads its prompt in both directions."""
    tok = tokenizer(["<image>"], "<image>", image_token="<image>")
    images = SiglipImageProcessorPil(size=SIDE)
    images.image_seq_length = 4
    processor = hf.PaliGemmaProcessor(images, tok, chat_template=tok.chat_template)
    config = hf.PaliGemmaConfig(  # its processor adds 1024 tokens for places and 128 for segments
        text_config={**TEXT, "model_type": "gemma", "head_dim": 8, "vocab_size": 1600},
        vision_config={**VISION, "model_type": "siglip_vision_model", "projection_dim": 32, "vision_use_head": False},
        image_token_index=processor.image_token_id,
        projection_dim=32,
    )
    return hf.PaliGemmaForConditionalGeneration(config), processor


def llava_onevision() -> Built:
    """SigLIP tower, tiles of any resolution, Qwen2."""
    names = {"image_token": "<image>", "video_token": "<video>"}
    tok = tokenizer(list(names.values()), "<image>", **names)
    config = hf.LlavaOnevisionConfig(
        text_config=hf.Qwen2Config(**TEXT),
        vision_config=hf.SiglipVisionConfig(**VISION, vision_use_head=False),
        image_token_index=tok.convert_tokens_to_ids("<image>"),
        video_token_index=tok.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=PINPOINTS,
    )
    processor = hf.LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessorPil(size=SIDE, image_grid_pinpoints=PINPOINTS),
        tok,
        hf.LlavaOnevisionVideoProcessor(),
        num_image_tokens=4,
        vision_feature_select_strategy="full",
        chat_template=tok.chat_template,
    )
    return hf.LlavaOnevisionForConditionalGeneration(config), processor


QWEN = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
}
QWEN_TEXT = {
    **TEXT,
    "hidden_size": 64,
    "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0},
}


def qwen(model: type, config: type, processor: type, vision: dict) -> Built:
    """A Qwen-VL: patches of any resolution, a patch merger, Qwen with three-axis rotary positions."""
    tok = tokenizer(list(QWEN.values()), "<|vision_start|><|image_pad|><|vision_end|>", **QWEN)
    ids = {f"{name}_id": tok.convert_tokens_to_ids(token) for name, token in QWEN.items()}
    images = Qwen2VLImageProcessorPil(size={"shortest_edge": 4 * 14**2, "longest_edge": 16 * 14**2})
    video = hf.Qwen2VLVideoProcessor()
    built = processor(images, tok, video, chat_template=tok.chat_template)
    return model(config(text_config=QWEN_TEXT, vision_config=vision, **ids)), built


def qwen2_vl() -> Built:
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 4, "mlp_ratio": 2, "patch_size": 14}
    return qwen(hf.Qwen2VLForConditionalGeneration, hf.Qwen2VLConfig, hf.Qwen2VLProcessor, vision)


def qwen2_5_vl() -> Built:
    """With windowed attention in its tower."""
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "out_hidden_size": 64,
        "intermediate_size": 48,
        "num_heads": 4,
        "patch_size": 14,
        "window_size": 56,
        "fullatt_block_indexes": [1],
    }
    return qwen(hf.Qwen2_5_VLForConditionalGeneration, hf.Qwen2_5_VLConfig, hf.Qwen2_5_VLProcessor, vision)


def internvl() -> Built:
    """InternViT, pixel shuffle and a two-layer projector, Qwen2."""
    names = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    tok = tokenizer(list(names.values()), "<IMG_CONTEXT>", **names)
    config = hf.InternVLConfig(
        text_config=hf.Qwen2Config(**TEXT),
        vision_config={**VISION, "image_size": [28, 28], "patch_size": [14, 14]},
        image_token_id=tok.convert_tokens_to_ids("<IMG_CONTEXT>"),
        downsample_ratio=0.5,
    )
    images = hf.GotOcr2ImageProcessor(size=SIDE, crop_to_patches=False)
    processor = hf.InternVLProcessor(
        images, tok, hf.InternVLVideoProcessor(size=SIDE), image_seq_length=1, chat_template=tok.chat_template
    )
    return hf.InternVLForConditionalGeneration(config), processor


def pico_llama() -> tuple[hf.PreTrainedModel, hf.PreTrainedTokenizerFast]:
    """A text-only Llama with the same tokenizer."""
    return hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT)), tokenizer()


WITH_TORCHVISION: dict[str, Callable[[], Built]] = {
    "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": qwen2_5_vl,
    "internvl": internvl,
    "llava_onevision": llava_onevision,
}
FAMILIES: dict[str, Callable[[], Built]] = {
    "llava": llava,
    "llava_next": llava_next,
    "idefics3": idefics3,
    "gemma3": gemma3,
}
"""The families that can be built here; those whose processors need torchvision are among them where it is installed."""
if importlib.util.find_spec("torchvision"):
    FAMILIES.update(WITH_TORCHVISION)


OTHERS = {"llama": pico_llama, "paligemma": paligemma}  # text alone; a family that is asked in its own way


def build(name: str, seed: int = 0) -> Built:
    """The model and the processor of one family (or of ``OTHERS``), always the same for one seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, processor = {**FAMILIES, **OTHERS}[name]()
    return model.eval(), processor


def save(name: str, folder: str | Path, seed: int = 0) -> Path:
    """Writes a family as a Hugging Face folder, which ``transformers``' ``Auto`` classes read back."""
    model, processor = build(name, seed)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return Path(folder)


# --- pictures and questions -----------------------------------------------------------------------------------------


def facts(i: int) -> dict[str, str]:
    """What picture ``i`` shows: the right answer to each question."""
    return {"color": list(COLORS)[i % 4], "shape": SHAPES[i // 4 % 2], "side": SIDES[i // 8 % 2]}


def picture(i: int) -> Image.Image:
    """Picture ``i``, 48 x 32 pixels: one coloured shape on white. There are sixteen; then they come again."""
    shown = facts(i)
    image = Image.new("RGB", (48, 32), "white")
    draw = ImageDraw.Draw(image)
    x = 4 if shown["side"] == "left" else 24
    shape = draw.rectangle if shown["shape"] == "square" else draw.ellipse
    shape((x, 6, x + 19, 25), fill=COLORS[shown["color"]])
    return image


def write_data(folder: str | Path, n: int = 8, tasks: Sequence[str] = ("color",)) -> Path:
    """Writes ``n`` pictures and one question per picture and task.

    Returns:
        ``folder/train.jsonl``, whose rows hold ``image``, ``question``, ``answer`` and ``task``.
    """
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(n):
        image = f"images/{i}.png"
        picture(i).save(folder / image)
        rows += [
            {"image": image, "question": QUESTIONS[task], "answer": facts(i)[task], "task": task} for task in tasks
        ]
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
