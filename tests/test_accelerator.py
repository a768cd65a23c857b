"""Everything on an accelerator: what is trained, asked and loaded there is what it is on the CPU."""

from __future__ import annotations

import json
import threading

import contract
import pico
import pretend
import pytest
import torch
from commands import done
from contract import CASES, adapt, close, loss, sgd, texts, weights
from peft import LoraConfig, PeftModel
from peft.tuners.lora.config import CordaConfig
from pretend import PRETEND, SECOND
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import lorasculpt
from lorasculpt import Clock, LoRASculptConfig, corda
from lorasculpt.adapters import update
from lorasculpt.adapters.method import method_logs
from lorasculpt.config import RunConfig
from lorasculpt.data.records import read
from lorasculpt.evaluation import answer, fisher, prompts, self_prompts
from lorasculpt.methods import lwf
from lorasculpt.models.parts import target_regex
from lorasculpt.play import Panel


@pytest.fixture
def there():
    with pretend.device() as device:
        yield device


def test_what_lies_on_two_devices_is_refused(there):
    one, other = torch.ones(2).to(there), torch.ones(2)
    assert (one + one).device == PRETEND
    with pytest.raises(RuntimeError, match="1 of 2 tensors on the CPU"):
        one + other
    other.copy_(one)
    assert (one * 2).tolist() == [2, 2]
    second = one.to(SECOND)
    assert (second + second).device == SECOND
    with pytest.raises(RuntimeError, match="tensors on 2 devices"):
        second.sum() + one.sum()


def trained(method: str, device: torch.device):
    """A text model with an adapter after four steps on ``device``; its clock is read back in between."""
    (batch,) = texts(length=6)
    batch = {key: value.to(device) for key, value in batch.items()}
    model = adapt(pico.build("llama")[0].to(device), method)
    optimizer = sgd(model)
    clock = Clock(model, optimizer, 4)
    model.train()
    for step in range(4):
        clock.begin_step()
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()
        clock.end_step()
        if step == 2:
            clock.load_state_dict(clock.state_dict())
    clock.close()
    return model.eval(), batch


@pytest.mark.parametrize("method", CASES)
def test_a_method_learns_there_what_it_learns_here(method, there, tmp_path):
    here, _ = trained(method, torch.device("cpu"))
    model, batch = trained(method, there)
    assert {value.device for value in (*model.parameters(), *model.buffers())} == {PRETEND}
    close(weights(here), {name: value.cpu() for name, value in weights(model).items()})
    here.save_pretrained(tmp_path)
    again = lorasculpt.load(pico.build("llama")[0].to(there), tmp_path, trainable=True).eval()
    assert {value.device for value in (*again.parameters(), *again.buffers())} == {PRETEND}
    torch.testing.assert_close(contract.logits(again, batch).cpu(), contract.logits(model, batch).cpu())


def spread(base: nn.Module, first: torch.device, second: torch.device) -> nn.Module:
    """``base`` as device_map="auto" has it on two devices: each part is given its inputs where it lies."""
    inner = base.model
    inner.to(first)
    for part in (inner.layers[1], inner.norm, base.lm_head):
        part.to(second)
    for part, device in ((inner.layers[1], second), (inner.norm, second), (base.lm_head, second)):
        part.register_forward_pre_hook(
            lambda module, args, kwargs, device=device: tree_map_only(
                torch.Tensor, lambda value: value.to(device), (args, kwargs)
            ),
            with_kwargs=True,
        )
    return base


def stepped(method: str, first: torch.device, second: torch.device) -> tuple[dict, dict]:
    """What two steps on two devices make of an adapter, and what is shown of them.

    No backward pass goes from one pretended device to another: all gradients are ones.
    """
    base = spread(pico.build("llama")[0], first, second)
    model = adapt(base, method, target_modules=["q_proj", "v_proj"]).train()
    batch = {key: value.to(first) for key, value in texts(length=4)[0].items()}
    optimizer = sgd(model)
    clock = Clock(model, optimizer, 3)
    for _ in range(2):
        clock.begin_step()
        model(**contract.inputs(model, batch), labels=batch["labels"])
        for parameter in contract.trained(model):
            parameter.grad = torch.ones_like(parameter)
            for hook in parameter._post_accumulate_grad_hooks.values():
                hook(parameter)
        optimizer.step()
        optimizer.zero_grad()
        clock.end_step()
    clock.close()
    return {name: value.cpu() for name, value in weights(model).items()}, method_logs(model)


@pytest.mark.parametrize("method", CASES)
def test_a_model_that_lies_on_several_devices_is_trained_as_on_one(method, monkeypatch):
    def at_once(output, loss, weight, stats, note):
        note(stats.detach(), loss.detach())
        return output

    for module in (update, lwf):
        monkeypatch.setattr(module, "carry", at_once)
    here, shown = stepped(method, *[torch.device("cpu")] * 2)
    with pretend.device():
        there, shown_there = stepped(method, PRETEND, SECOND)
    close(here, there)
    assert shown_there == pytest.approx(shown, rel=1e-4)
    assert shown or method == "full"


class Waits(TorchDispatchMode):
    """How often a number is read off a tensor: a program waits then for its device to have made it."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", CASES)
def test_a_step_waits_for_the_device_a_few_times_and_not_in_every_linear(method):
    model = adapt(pico.build("llama")[0], method).train()
    optimizer = sgd(model)
    clock = Clock(model, optimizer, 6)
    with Waits() as waits:
        clock.begin_step()
        loss(model, texts(length=4)[0]).backward()
        optimizer.step()
        clock.end_step()
    clock.close()
    assert waits.count <= 4 < len(model.targeted_module_names)


def test_masks_that_were_made_before_their_weights_came_follow_them(there, tmp_path):
    adapt(pico.build("llama")[0], "lorasculpt", target_modules=["q_proj"]).save_pretrained(tmp_path)
    config = LoRASculptConfig.from_pretrained(tmp_path)
    base = pico.build("llama")[0].to(there)
    model = PeftModel.from_pretrained(base, tmp_path, config=config, is_trainable=True, low_cpu_mem_usage=True)
    assert {value.device for value in (*model.parameters(), *model.buffers())} == {PRETEND}


@pytest.fixture
def run(a_run, tmp_path):
    """The path of a run's file."""
    data = "data/train.jsonl"
    a_run(
        method={"name": "lorasculpt", "r": 4, "lora_alpha": 8, "prune_step": 1},
        training={"steps": 3, "batch": 2, "lr": 0.1, "precision": "fp32", "report_to": []},
        evaluate={"source": [data], "target": [data], "drift": 2, "max_new_tokens": 3, "retain": 0.5},
    )
    return tmp_path / "run.yaml"


ROUTED = "method={name: loramoe, r: 4, lora_alpha: 8}"


@pytest.mark.parametrize("overrides", [(), (ROUTED, "evaluate.metric={color: contains}")], ids=["sculpted", "routed"])
def test_a_run_is_measured_there_as_here(overrides, run, tmp_path):
    done("train", run, *overrides)
    files = {"eval": tmp_path / "out" / "results.json", "dial": tmp_path / "out" / "dial.json"}
    here = {}
    for verb, file in files.items():
        done(verb, run, *overrides)
        here[verb] = json.loads(file.read_text())
        file.unlink()
    (tmp_path / "out" / "base-answers.json").unlink()
    with pretend.device():
        for verb, file in files.items():
            done(verb, run, *overrides)
            there = json.loads(file.read_text())
            points = [found["runs"][0]["curve"] if verb == "eval" else found["points"] for found in (here[verb], there)]
            for one, other in zip(*points, strict=True):
                assert one.keys() == other.keys()
                assert all(one[key] == pytest.approx(other[key], abs=1e-4) for key in one)


def test_a_thread_prepares_what_is_asked_there(there, tmp_path, monkeypatch):
    """Which a CPU has no processor left for; what comes of it is the same."""
    model, processor = pico.build("llava")
    records = read(pico.write_data(tmp_path, n=2))
    opened, look = [], prompts.open_image
    note = lambda path: opened.append(threading.current_thread()) or look(path)  # noqa: E731
    monkeypatch.setattr(prompts, "open_image", note)
    here = answer(model, processor, records, batch=1, max_new_tokens=2)
    assert set(opened) == {threading.current_thread()}
    opened.clear()
    assert answer(model.to(there), processor, records, batch=1, max_new_tokens=2) == here
    assert len(opened) == 2
    assert threading.current_thread() not in opened


def test_a_finished_adapter_is_shown_and_edited_there(run, tmp_path):
    done("train", run)
    adapter, base = tmp_path / "out" / "adapter", RunConfig.load(run).base
    data = tmp_path / "data" / "train.jsonl"
    done("train", run, ROUTED, "output=routed")
    edit = ("posthoc", "tailor", adapter, "--base", base, "--data", data, "--out")
    look = ("inspect", tmp_path / "routed" / "adapter", "--base", base, "--data", data, "--json")
    done(*edit, tmp_path / "here")
    loads = done(*look, tmp_path / "here.json")
    picture = read(data)[0].images[0]
    with pretend.device():
        done(*edit, tmp_path / "there")
        assert done(*look, tmp_path / "there.json").replace("there", "here") == loads
        panel = Panel(base, {"a": adapter})
        for one in panel.answerers:
            assert next(one.model.parameters()).device == PRETEND
            panel.answer(one, "What is it?", picture, max_new_tokens=3)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("here", "there"))
    close(one, other)


def test_the_texts_that_corda_and_ewc_begin_with_are_read_there(there, tmp_path):
    base, processor = pico.build("llava")
    base.to(there)
    records = read(pico.write_data(tmp_path, n=4))
    config = LoraConfig(
        init_lora_weights="corda", corda_config=CordaConfig(), r=2, target_modules=target_regex(base, "language")
    )
    corda.prepare(base, processor, config, records, None)
    fisher(base, processor, self_prompts(base, processor, 2, max_new_tokens=3), tmp_path / "fisher.safetensors")
    assert load_file(tmp_path / "fisher.safetensors")
