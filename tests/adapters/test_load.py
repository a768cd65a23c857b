from __future__ import annotations

import json
import shutil

import pico
import pytest
import torch
import transformers as hf
from contract import adapt, equal, logits, masks, sgd, start, texts, train, trained, weights
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainingArguments

import lorasculpt
from lorasculpt import Clock, ClockCallback, LoRASculptConfig, UserError
from lorasculpt.adapters.layers import sites
from lorasculpt.adapters.method import methods_of


def llama():
    return pico.build("llama")[0]


@pytest.fixture
def sculpted(tmp_path):
    """A model pruned at step 2 of 3, and the folder that it was saved to."""
    model, _ = start("llama", prune_step=2, omega=2.0)
    train(model, [texts()] * 3)
    model.save_pretrained(tmp_path / "adapter")
    return model, tmp_path / "adapter"


def test_for_inference_it_is_plain_lora(sculpted):
    model, folder = sculpted
    loaded = lorasculpt.load(llama(), folder)
    assert loaded.peft_config["default"].peft_type == "LORA"
    assert not trained(loaded)
    assert methods_of(loaded) == {}
    assert torch.equal(logits(loaded.eval(), texts()[0]), logits(model, texts()[0]))


def test_for_training_method_masks_and_settings_come_back(sculpted):
    model, folder = sculpted
    loaded = lorasculpt.load(llama(), folder, trainable=True).eval()
    assert loaded.peft_config["default"].settings() == model.peft_config["default"].settings()
    assert loaded.peft_config["default"].omega == 2.0
    assert {p for n, p in loaded.named_parameters() if "lora_" in n} == set(trained(loaded))
    assert equal(masks(loaded), masks(model))
    ours, theirs = methods_of(loaded)["default"], methods_of(model)["default"]
    assert (ours.step, ours.pruned, ours.prune_step) == (theirs.step, theirs.pruned, theirs.prune_step) == (3, True, 2)
    assert torch.equal(logits(loaded, texts()[0]), logits(model, texts()[0]))
    for each in (model, loaded):
        train(each, [texts()] * 2)
    assert equal(weights(loaded), weights(model))


def test_weights_that_come_after_the_layers_are_masked_too(sculpted):
    model, folder = sculpted
    config = LoRASculptConfig.from_pretrained(folder)
    loaded = PeftModel.from_pretrained(llama(), folder, config=config, is_trainable=True, low_cpu_mem_usage=True).eval()
    assert equal(masks(loaded), masks(model))
    assert torch.equal(logits(loaded, texts()[0]), logits(model, texts()[0]))


def test_masks_whose_file_is_gone_are_read_off_the_zeros(sculpted):
    model, folder = sculpted
    (folder / "lorasculpt_state.safetensors").unlink()
    loaded = lorasculpt.load(llama(), folder, trainable=True).eval()
    assert equal(masks(loaded), masks(model))
    for each in (model, loaded):
        train(each, [texts()] * 2)
    assert equal(weights(loaded), weights(model))


def test_what_the_weights_do_not_tell_is_missed(sculpted, tmp_path):
    model, folder = sculpted
    (folder / "lorasculpt_state.safetensors").unlink()
    saved = load_file(folder / "adapter_model.safetensors")
    name = next(name for name in saved if "lora_A" in name)
    saved[name].view(-1)[saved[name].view(-1).nonzero()[0]] = 0  # a kept entry that has become 0
    save_file(saved, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"adapter lacks lorasculpt_state\.safetensors, which was saved with"):
        lorasculpt.load(llama(), folder, trainable=True)
    model, _ = start("llama", "spider")
    train(model, [texts()] * 2)
    model.save_pretrained(tmp_path / "spider")
    (tmp_path / "spider" / "lorasculpt_state.safetensors").unlink()
    with pytest.raises(UserError, match=r"spider lacks lorasculpt_state\.safetensors"):
        lorasculpt.load(llama(), tmp_path / "spider", trainable=True)


@pytest.mark.parametrize("trainable", [False, True])
def test_a_second_adapter_comes_beside_the_first(sculpted, tmp_path, trainable):
    model, folder = sculpted
    other, _ = start("llama", prune_step=1, density=0.3)
    train(other, [texts()] * 2)
    other.save_pretrained(tmp_path / "other")
    both = lorasculpt.load(llama(), folder, trainable)
    assert lorasculpt.load(both, tmp_path / "other", trainable, adapter="other") is both
    for name, alone in (("default", model), ("other", other), ("default", model)):
        both.set_adapter(name)
        assert torch.equal(logits(both.eval(), texts()[0]), logits(alone.eval(), texts()[0]))
    if trainable:
        assert equal(masks(both, "other"), masks(other))
        both.set_adapter("other")
        train(both, [texts()] * 2)
        train(other, [texts()] * 2)
        assert equal(weights(both, "other"), weights(other))
    with pytest.raises(UserError, match="has an adapter 'other' already"):
        lorasculpt.load(both, folder, trainable, adapter="other")
    with pytest.raises(UserError, match=r"does not put them side by side; load both with trainable=True\.$"):
        lorasculpt.load(both, folder, not trainable, adapter="third")


@pytest.mark.parametrize("steps", [0, 1, 2, 3])
@pytest.mark.parametrize("densities", [{}, {"density_a": 1.0}, {"density_b": 1.0}, {"density": 1.0}], ids=str)
def test_saving_and_loading_on_the_way_changes_nothing(tmp_path, steps, densities):
    model, _ = start("llama", prune_step=0.5, **densities)
    train(model, [texts()] * steps, total_steps=4)
    model.save_pretrained(tmp_path)
    loaded = lorasculpt.load(llama(), tmp_path, trainable=True)
    assert equal(masks(loaded), masks(model))
    for each in (model, loaded):
        train(each, [texts()] * (4 - steps), total_steps=4)
    assert equal(weights(loaded), weights(model))
    assert equal(masks(loaded), masks(model))


def test_a_share_of_training_is_decided_once(tmp_path):
    model, _ = start("llama", prune_step=0.5)
    train(model, [texts()], total_steps=4)
    model.save_pretrained(tmp_path)
    loaded = lorasculpt.load(llama(), tmp_path, trainable=True)
    train(loaded, [texts()], total_steps=40)
    assert methods_of(loaded)["default"].prune_step == 2
    assert methods_of(loaded)["default"].pruned


@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("densities", [{}, {"density_a": 1.0}, {"density_b": 1.0}, {"density": 1.0}], ids=str)
def test_weights_alone_tell_the_masks(steps, densities):
    """As when a trainer brings its best model back: there is no state file to read."""
    model, _ = start("llama", prune_step=2, **densities)
    train(model, [texts()] * steps)
    other, _ = start("llama", prune_step=2, **densities)
    train(other, [texts()] * 2)  # whatever it was before
    set_peft_model_state_dict(other, get_peft_model_state_dict(model))
    assert equal(weights(other), weights(model))
    assert equal(masks(other), masks(model))
    if densities != {"density": 1.0}:  # pruning to everything leaves no trace, and needs none
        assert methods_of(other)["default"].pruned == methods_of(model)["default"].pruned
    assert not methods_of(other)["default"].uncertain


def test_the_config_alone_comes_back_with_its_settings(sculpted):
    model, folder = sculpted
    config = LoRASculptConfig.from_pretrained(folder)
    assert config.settings() == model.peft_config["default"].settings()
    assert config.peft_type == "LORASCULPT"
    assert (config.r, config.lora_alpha) == (4, 8)


def test_a_plain_folder_is_no_config_of_a_method(tmp_path):
    get_peft_model(llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds no lorasculpt adapter"):
        LoRASculptConfig.from_pretrained(tmp_path)
    loaded = lorasculpt.load(llama(), tmp_path, trainable=True)
    assert loaded.peft_config["default"].peft_type == "LORA"
    assert trained(loaded)
    train(loaded, [texts()])  # a clock without a method has nothing to refuse


def test_a_kept_entry_that_is_zero_stays_kept(sculpted, tmp_path):
    model, folder = sculpted
    site = next(iter(sites(model).values()))
    place = tuple(site.b.mask.nonzero()[0])
    with torch.no_grad():
        site.b.weight[place] = 0.0
    model.save_pretrained(folder)
    loaded = lorasculpt.load(llama(), folder, trainable=True)
    assert equal(masks(loaded), masks(model))
    train(loaded, [texts()])
    assert next(iter(sites(loaded).values())).b.weight[place] != 0


@pytest.mark.parametrize("trainable", [False, True])
def test_another_name_and_a_folder_of_several_adapters(tmp_path, trainable):
    model, _ = start("llama", prune_step=1)
    model.add_adapter("second", LoRASculptConfig(r=2, target_modules=["v_proj"], density=0.25, prune_step=1))
    model.set_adapter("second")
    train(model, [texts()] * 2)
    model.save_pretrained(tmp_path)
    loaded = lorasculpt.load(llama(), tmp_path / "second", trainable=trainable, adapter="third")
    assert list(loaded.peft_config) == ["third"]
    assert torch.equal(logits(loaded.eval(), texts()[0]), logits(model, texts()[0]))
    if trainable:
        assert equal(masks(loaded, "third"), masks(model, "second"))


# --- what is refused ------------------------------------------------------------------------------------------------


def test_training_a_pruned_adapter_as_plain_lora_is_refused(sculpted, tmp_path):
    _, folder = sculpted
    plain = PeftModel.from_pretrained(llama(), folder, is_trainable=True)
    with pytest.raises(UserError, match=r"load it with lorasculpt\.load\(base, folder, trainable=True\)"):
        Clock(plain, sgd(plain))
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True, max_steps=2)
    trainer = Trainer(plain, arguments, train_dataset=[{"input_ids": texts()[0]["input_ids"][0]}] * 4)
    trainer.add_callback(ClockCallback())
    with pytest.raises(UserError, match="would fill its zeros again"):
        trainer.train()


def wider():
    return hf.LlamaForCausalLM(hf.LlamaConfig(**{**pico.TEXT, "hidden_size": 64}))


def deeper():
    return hf.LlamaForCausalLM(hf.LlamaConfig(**{**pico.TEXT, "num_hidden_layers": 3}))


def shallower():
    return hf.LlamaForCausalLM(hf.LlamaConfig(**{**pico.TEXT, "num_hidden_layers": 1}))


def other_family():
    return hf.GPT2LMHeadModel(hf.GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=420))


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("base", [wider, deeper, shallower, other_family])
def test_another_base_is_refused(sculpted, base, trainable):
    _, folder = sculpted
    (folder / "base.json").unlink()  # by its shapes alone
    with pytest.raises(
        UserError, match=r"does not fit this base model \([^\n\t]*\); name the model it was trained on\.$"
    ):
        lorasculpt.load(base(), folder, trainable=trainable)


def test_a_name_is_no_base(sculpted):
    with pytest.raises(
        UserError, match="load takes the base as a model, loaded with from_pretrained, and not 'me/base'"
    ):
        lorasculpt.load("me/base", sculpted[1])


def test_a_folder_without_an_adapter_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no adapter"):
        lorasculpt.load(llama(), tmp_path)


def test_files_that_are_cut_short_are_refused(sculpted):
    _, folder = sculpted
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    whole = weights.read_bytes()
    for size in (0, 20, len(whole) - 8):
        weights.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"adapter_model\.safetensors is damaged or cut short"):
            lorasculpt.load(llama(), folder)
    weights.rename(folder / "adapter_model.bin")
    with pytest.raises(UserError, match="no pickle is read"):
        lorasculpt.load(llama(), folder)
    weights.write_bytes(whole)
    config.write_text(config.read_text()[:-20])
    with pytest.raises(UserError, match=r"adapter_config\.json is no readable JSON"):
        lorasculpt.load(llama(), folder)


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"schema": 1}', b'{"schema": "1"}', b"\xff\xfe"])
def test_a_damaged_file_beside_the_adapter_is_refused(sculpted, content, trainable):
    _, folder = sculpted
    (folder / "lorasculpt.json").write_bytes(content)
    with pytest.raises(
        UserError, match=r"lorasculpt\.json (is no readable JSON|must hold|is not what lorasculpt writes)"
    ):
        lorasculpt.load(llama(), folder, trainable=trainable)


def test_a_state_that_is_cut_short_is_refused(sculpted):
    _, folder = sculpted
    state = folder / "lorasculpt_state.safetensors"
    state.write_bytes(state.read_bytes()[:-8])
    with pytest.raises(UserError, match=r"lorasculpt_state\.safetensors is damaged or cut short"):
        lorasculpt.load(llama(), folder, trainable=True)


def test_files_of_the_future_are_refused(sculpted):
    _, folder = sculpted
    path = folder / "lorasculpt.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "method": "better"}))
    with pytest.raises(UserError, match="made by the method 'better', which this version does not have"):
        lorasculpt.load(llama(), folder, trainable=True)
    path.write_text(json.dumps({**record, "schema": 2}))
    with pytest.raises(UserError, match="upgrade to read it"):
        lorasculpt.load(llama(), folder, trainable=True)


# --- a fully trained projector --------------------------------------------------------------------------------------


def test_a_projector_beside_the_adapter_replaces_the_bases(tmp_path):
    base, _ = pico.build("llava")
    names = [name for name in base.state_dict() if "multi_modal_projector" in name]
    projector = {name: torch.randn_like(base.state_dict()[name]) for name in names}
    adapt(base).save_pretrained(tmp_path)
    save_file(projector, tmp_path / "projector.safetensors")
    loaded = lorasculpt.load(pico.build("llava")[0], tmp_path)
    found = loaded.get_base_model().state_dict()
    assert all(torch.equal(found[name], projector[name]) for name in names)


@pytest.mark.parametrize("make", [adapt, lambda base: get_peft_model(base, LoraConfig(target_modules=["q_proj"]))])
def test_an_adapter_is_not_trained_further_without_its_projector(tmp_path, make):
    base, _ = pico.build("llava")
    projector = {name: value for name, value in base.state_dict().items() if "multi_modal_projector" in name}
    make(base).save_pretrained(tmp_path)
    save_file(projector, tmp_path / "projector.safetensors")
    with pytest.raises(UserError, match=r"a trained projector, which save_pretrained would leave out .*to merged, and"):
        lorasculpt.load(pico.build("llava")[0], tmp_path, trainable=True)
    assert trained(lorasculpt.load(pico.build("llava")[0], tmp_path, trainable=True, saves_projector=True))


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])  # PEFT writes down the class, or else only where it lay
def test_a_family_of_the_same_shapes_is_another_model(tmp_path, task_type):
    for name in ("base", "copy"):
        pico.save("llama", tmp_path / name)
    model = hf.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    get_peft_model(model, LoraConfig(target_modules=["q_proj"], task_type=task_type)).save_pretrained(
        tmp_path / "adapter"
    )
    other = hf.MistralForCausalLM(hf.MistralConfig(**pico.TEXT))
    with pytest.raises(
        UserError, match=r"\(it was trained on \S+, and this is mistral\); name the model it was trained"
    ):
        lorasculpt.load(other, tmp_path / "adapter")
    lorasculpt.load(hf.LlamaForCausalLM.from_pretrained(tmp_path / "copy"), tmp_path / "adapter")
    if task_type:
        shutil.rmtree(tmp_path / "base")
        lorasculpt.load(other, tmp_path / "adapter")  # nobody can tell any more


@pytest.mark.parametrize(
    "tensors",
    [{"model.bridge.weight": torch.ones(2)}, {"model.multi_modal_projector.linear_1.weight": torch.ones(2, 2)}],
    ids=["another name", "another shape"],
)
def test_a_projector_of_another_base_is_refused(tmp_path, tensors):
    base, _ = pico.build("llava")
    adapt(base).save_pretrained(tmp_path)
    save_file(tensors, tmp_path / "projector.safetensors")
    with pytest.raises(UserError, match="does not fit this base model"):
        lorasculpt.load(pico.build("llava")[0], tmp_path)
