"""The Fisher information is that of a loop over texts and weights; faults are seen."""

from __future__ import annotations

import json
import logging

import numpy as np
import pico
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from lorasculpt import UserError
from lorasculpt.adapters.fisher import KIND, read_fisher, save_fisher
from lorasculpt.data.records import read
from lorasculpt.evaluation.drift import Prompt, self_prompts
from lorasculpt.evaluation.fisher import fisher, spoken
from lorasculpt.evaluation.prompts import chat, encode
from lorasculpt.models.parts import linears

NAMES = [
    f"model.language_model.layers.{layer}.{part}" for layer in (0, 1) for part in ("self_attn.q_proj", "mlp.up_proj")
]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """The tiny VLM's processor, and texts of different lengths, half of them about pictures."""
    base, processor = pico.build("llava")
    pictures = [pico.write_data(tmp_path_factory.mktemp("data"), n=2).parent / f"images/{i}.png" for i in range(2)]
    prompts = self_prompts(base, processor, 4, images=pictures, max_new_tokens=6)
    return processor, [Prompt(prompt.record, prompt.tokens[: 2 + i]) for i, prompt in enumerate(prompts)]


def read_back(path) -> tuple[dict[str, torch.Tensor], dict]:
    """F in its own units, and the metadata."""
    with safe_open(path, "pt") as file:
        kept = json.loads(file.metadata()[KIND])
        return {name: file.get_tensor(name).float() * kept["mean"] for name in file.keys()}, kept  # noqa: SIM118


def scores(base, processor, prompt) -> list[dict[str, np.ndarray]]:
    """For each token of a text, the gradient of its log-probability with respect to the weights, by autograd."""
    inputs = encode(base, processor, [prompt.record], [chat(processor, prompt.record)])
    length = inputs["input_ids"].shape[1]
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([prompt.tokens])], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    said, found = base(**inputs).logits[0].log_softmax(-1), []
    for at, token in enumerate(prompt.tokens):
        base.zero_grad()
        said[length + at - 1, token].backward(retain_graph=True)
        found.append({name: base.get_submodule(name).weight.grad.double().numpy().copy() for name in NAMES})
    base.zero_grad()
    return found


def near(found, right) -> bool:
    """Whether they are the same but for the rounding of the file."""
    return all(
        np.allclose(found[name].numpy(), right[name], rtol=5e-3, atol=1e-5 * right[name].max()) for name in right
    )


def test_it_is_the_mean_over_tokens_of_the_squared_gradients_of_texts(texts, tmp_path):
    processor, prompts = texts
    base = pico.build("llava")[0]
    fisher(base, processor, prompts, tmp_path / "f.safetensors", modules=NAMES)
    found, kept = read_back(tmp_path / "f.safetensors")
    tokens = [len(prompt.tokens) for prompt in prompts]
    assert (kept["texts"], kept["tokens"]) == (len(prompts), sum(tokens))
    each = [scores(base, processor, prompt) for prompt in prompts]
    whole = [{name: sum(score[name] for score in text) for name in NAMES} for text in each]
    right = {name: sum(text[name] ** 2 for text in whole) / sum(tokens) for name in NAMES}
    assert near(found, right)
    assert kept["mean"] == pytest.approx(np.mean(np.concatenate([F.ravel() for F in right.values()])), rel=1e-4)

    # what would be found by mistake is not near it
    wrong = {
        "not squared": {name: sum(abs(text[name]) for text in whole) / sum(tokens) for name in NAMES},
        "squared at the end": {name: sum(text[name] for text in whole) ** 2 / sum(tokens) for name in NAMES},
        "per text": {name: sum(text[name] ** 2 for text in whole) / len(whole) for name in NAMES},
        "of single tokens": {
            name: sum(score[name] ** 2 for text in each for score in text) / sum(tokens) for name in NAMES
        },
        "of one text less": {name: sum(text[name] ** 2 for text in whole[1:]) / sum(tokens) for name in NAMES},
    }
    for name, other in wrong.items():
        assert not near(found, other), name


def test_a_linear_that_is_passed_twice_counts_once(texts, tmp_path):
    processor, prompts = texts
    base = pico.build("llava")[0]
    first, second = base.model.language_model.layers
    second.mlp = first.mlp
    names = [NAMES[1]]
    fisher(base, processor, prompts[:1], tmp_path / "f.safetensors", modules=names)
    text = scores(base, processor, prompts[0])
    right = {name: sum(score[name] for score in text) ** 2 / len(text) for name in names}
    assert near(read_back(tmp_path / "f.safetensors")[0], right)


def test_sampled_texts_estimate_what_all_answers_would_give(tmp_path):
    """One token each, drawn as often as the base would say it: the Fisher information is that of its definition."""
    base, processor = pico.build("llama")
    name = "model.layers.1.mlp.down_proj"
    with torch.no_grad():
        base.lm_head.weight.mul_(30)  # few answers are likely
    (prompt,) = self_prompts(base, processor, 1, max_new_tokens=1)
    inputs = encode(base, processor, [prompt.record], [chat(processor, prompt.record)])
    said = base(**inputs).logits[0, -1].log_softmax(-1)
    weight = base.get_submodule(name).weight
    exact = torch.zeros_like(weight)
    likely = (said.exp() > 1e-4).nonzero().flatten().tolist()
    for token in likely:
        (gradient,) = torch.autograd.grad(said[token], weight, retain_graph=True)
        exact += said[token].exp().detach() * gradient.square()
    counts = {token: round(60 * float(said[token].detach().exp())) for token in likely}
    drawn = [Prompt(prompt.record, (token,)) for token, count in counts.items() for _ in range(count)]
    fisher(base, processor, drawn, tmp_path / "f.safetensors", modules=[name])
    found = read_back(tmp_path / "f.safetensors")[0][name]
    assert float((found - exact).norm() / exact.norm()) < 0.1


def test_only_the_base_counts_and_nothing_is_left_changed(texts, tmp_path):
    processor, prompts = texts
    base = pico.build("llava")[0]
    fisher(base, processor, prompts[:2], tmp_path / "bare", modules=NAMES)
    model = get_peft_model(base, LoraConfig(r=2, lora_dropout=0.5, target_modules=NAMES)).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    base.model.multi_modal_projector.requires_grad_(True)
    before = {name: (parameter.requires_grad, parameter.clone()) for name, parameter in model.named_parameters()}
    state, hooks = torch.get_rng_state(), [len(module._forward_hooks) for module in model.modules()]
    fisher(model, processor, prompts[:2], tmp_path / "tuned")
    bare, tuned = (read_back(tmp_path / name)[0] for name in ("bare", "tuned"))
    assert bare.keys() == tuned.keys() == set(NAMES)
    assert all(torch.equal(bare[name], tuned[name]) for name in NAMES)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    for name, parameter in model.named_parameters():
        assert parameter.grad is None
        assert parameter.requires_grad == before[name][0]
        assert torch.equal(parameter, before[name][1])
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bare", "tuned"]


def test_without_an_adapter_it_is_of_the_language_part(texts, tmp_path):
    processor, prompts = texts
    base = pico.build("llava")[0]
    fisher(base, processor, prompts[:1], tmp_path / "f.safetensors", precision=torch.bfloat16)
    assert read_back(tmp_path / "f.safetensors")[0].keys() == linears(base, "language").keys()


def test_answers_of_given_data_are_what_training_would_have_it_say(tmp_path):
    _, processor = pico.build("llava")
    records = read(pico.write_data(tmp_path, n=2))
    prompts = spoken(processor, records)
    assert [prompt.record for prompt in prompts] == records
    assert [processor.tokenizer.decode(prompt.tokens) for prompt in prompts] == ["red<eos>", "green<eos>"]


def test_a_linear_that_no_text_tells_of_is_named(texts, tmp_path):
    processor, prompts = texts
    base = pico.build("llava")[0]
    tower = "model.vision_tower.encoder.layers.0.mlp.fc1"
    assert tower in linears(base, "vision")
    without = [prompt for prompt in prompts if not prompt.record.images]
    with pytest.raises(UserError, match=rf"^no text says anything about {tower}: give some with pictures, .*\.$"):
        fisher(base, processor, without, tmp_path / "f", modules=[tower])
    fisher(base, processor, prompts, tmp_path / "f", modules=[tower])
    assert read_back(tmp_path / "f")[0][tower].any()


@pytest.mark.parametrize(("bits", "off"), [(4, 0.4), (8, 0.05)])
def test_of_a_quantised_base_it_is_nearly_that_of_the_base(bits, off, tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(logging.getLogger("bitsandbytes"), "disabled", True)
    _, processor = pico.build("llama")
    sizes = {**pico.TEXT, "hidden_size": 64, "intermediate_size": 128}
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(tmp_path / "llama")
    how = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_compute_dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "llama").eval()
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "llama", quantization_config=how, device_map="cpu").eval()
    prompts = self_prompts(plain, processor, 2, max_new_tokens=4)
    found = []
    for name, model in (("plain", plain), ("quantised", base)):
        fisher(model, processor, prompts, tmp_path / name)
        found.append(read_back(tmp_path / name)[0])
    for name, F in found[0].items():
        assert float((found[1][name] - F).norm() / F.norm()) < off


def test_a_linear_that_lets_no_gradient_pass_is_refused(texts, tmp_path, monkeypatch):
    processor, prompts = texts
    base = pico.build("llava")[0]
    layer = base.get_submodule(NAMES[1])
    monkeypatch.setattr(layer, "forward", lambda x: torch.nn.functional.linear(x, layer.weight).detach())
    with pytest.raises(UserError, match=rf"^no gradient passes {NAMES[1]}, a Linear: load the base without quantiz"):
        fisher(base, processor, prompts, tmp_path / "f", modules=NAMES)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_base_that_has_moved_is_refused(start, texts, tmp_path):
    processor, prompts = texts
    model = get_peft_model(pico.build("llava")[0], LoraConfig(r=2, target_modules=NAMES, init_lora_weights=start))
    with pytest.raises(UserError, match=rf"^an adapter that starts with {start} has moved the base weights, .*\.$"):
        fisher(model, processor, prompts, tmp_path / "f")
    with pytest.raises(UserError, match=r"needs at least one text"):
        fisher(model, processor, [], tmp_path / "f")


# --- the file -------------------------------------------------------------------------------------------------------


def test_the_file_holds_what_fp16_could_not(tmp_path):
    made = {"a": torch.logspace(-30, -8, 24).view(4, 6), "b": torch.zeros(2, 3)}
    save_fisher(tmp_path / "f", made, texts=1)
    found, mean = read_fisher(tmp_path / "f", {"a": (4, 6)})
    assert found["a"].dtype == torch.bfloat16
    assert found.keys() == {"a"}
    np.testing.assert_allclose(found["a"].double() * mean, made["a"].double(), rtol=4e-3)
    assert np.asarray(made["a"].half() == 0).mean() > 0.9


def test_a_file_that_does_not_fit_is_refused_in_one_sentence(tmp_path):
    save_fisher(tmp_path / "f", {"a": torch.ones(2, 3)}, texts=1)
    save_file({"a": torch.ones(2, 3)}, tmp_path / "other")
    (tmp_path / "broken").write_bytes(b"no")
    for name, shapes, message in [
        ("gone", {}, r"gone, which is no file; lorasculpt\.evaluation\.fisher"),
        ("other", {}, r"other, which holds no Fisher information"),
        ("broken", {}, r"broken, which is no whole safetensors file"),
        ("f", {"b": (2, 3)}, r"has nothing of shape \(2, 3\) for b"),
        ("f", {"a": (3, 2)}, r"has nothing of shape \(3, 2\) for a"),
    ]:
        with pytest.raises(UserError, match=message):
            read_fisher(tmp_path / name, shapes)
    for nothing in (torch.zeros(2, 3), torch.full((2, 3), torch.nan)):
        with pytest.raises(UserError, match="on average, which tells nothing"):
            save_fisher(tmp_path / "f", {"a": nothing})
