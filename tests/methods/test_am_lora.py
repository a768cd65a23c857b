"""AM-LoRA against its equations, written once more in numpy with loops, and its switch from task to task."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pico
import pytest
import torch
from contract import adapt, logits, loss, start, texts, train, trained, weights
from peft import LoraConfig, get_peft_model
from torch import nn

import lorasculpt
from lorasculpt import AMLoRAConfig, LoRASculptConfig, UserError, add_task
from lorasculpt.adapters.context import Context
from lorasculpt.adapters.update import Place, updates
from lorasculpt.methods.am_lora import AMLoRAUpdate

ROWS, LENGTH, IN, OUT, R = 3, 4, 5, 4, 2
REAL = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1], [0, 0, 1, 1]], dtype=torch.bool)
GATES, SELECTORS = ("token", "feature", "dense"), ("all", "new")
HERE = Place("here", IN, OUT)


def make(kind: type[AMLoRAUpdate] = AMLoRAUpdate, *, tasks=3, padded=True, **settings) -> AMLoRAUpdate:
    """An update in float64 whose every tensor is random."""
    given = {"r": R, "lora_alpha": 3, "lora_dropout": 0.0, "l1_weight": 0.3, "tasks": [f"t{i}" for i in range(tasks)]}
    context = Context()
    context.padding = REAL if padded else None
    update = kind(AMLoRAConfig(**given | settings), HERE, context, nn.Linear(IN, OUT)).double()
    generator = torch.Generator().manual_seed(5)
    for tensor in update.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return update


def inputs() -> torch.Tensor:
    return torch.randn(ROWS, LENGTH, IN, generator=torch.Generator().manual_seed(6), dtype=torch.float64)


def tensors(update: AMLoRAUpdate) -> dict[str, np.ndarray]:
    return {key: value.detach().numpy().copy() for key, value in update.state_dict().items()}


# --- the reference --------------------------------------------------------------------------------------------------


def softmax(u):
    e = np.exp(u - u.max())
    return e / e.sum()


def reference(t, x, real, config):
    """(h - W0 x, the L1 term, the weights of every token) of the equations."""
    loras = [*zip(t["A_old"], t["B_old"], strict=True), (t["A"], t["B"])]
    heads = list(zip(t["v"], t["c"], strict=True))
    if config.selector == "new":
        heads = [*zip(t["v_old"], t["c_old"], strict=True), *heads]
    h, gates, l1, count = np.zeros((*x.shape[:2], OUT)), np.zeros((*x.shape[:2], len(loras), OUT)), 0.0, 0
    for row, at in itertools.product(range(x.shape[0]), range(x.shape[1])):
        o = [config.lora_alpha / config.r * b @ (a @ x[row, at]) for a, b in loras]
        u = np.zeros((len(loras), OUT))
        for i, (v, c) in enumerate(heads):
            for k in range(OUT):
                if config.gate == "token":
                    u[i, k] = max(0.0, sum(v[j] * o[i][j] for j in range(OUT)) + c)
                elif config.gate == "feature":
                    u[i, k] = max(0.0, v[k] * o[i][k] + c[k])
                else:
                    u[i, k] = max(0.0, sum(v[k, j] * o[i][j] for j in range(OUT)) + c[k])
        for k in range(OUT):
            gates[row, at, :, k] = softmax(u[:, k])
            for i in range(len(loras)):
                h[row, at, k] += gates[row, at, i, k] * o[i][k]
        if real[row][at]:
            l1, count = l1 + u.mean(1).sum(), count + 1
    return h, config.l1_weight * l1 / count if len(loras) > 1 else 0.0, gates


def counted(padded: bool) -> np.ndarray:
    return (REAL if padded else torch.ones_like(REAL)).numpy()


def total(update: AMLoRAUpdate, x: torch.Tensor) -> float:
    """The loss that rode on the backward pass of ``update(x)``."""
    update.noted = {}
    update(x.requires_grad_()).sum().backward()
    return float(update.noted["loss"])


def compare(update: AMLoRAUpdate, padded=True, **settings) -> None:
    """Fails unless ``update`` gives what the equations give under the config of ``make(**settings)``."""
    right, x = make(**settings), inputs()
    expected, l1, _ = reference(tensors(right), x.numpy(), counted(padded), right.config)
    np.testing.assert_allclose(update(x).detach().numpy(), expected, rtol=1e-5, atol=1e-8)
    np.testing.assert_allclose(total(update, x), l1, rtol=1e-5)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize(("tasks", "padded"), [(1, True), (2, False), (3, True)])
def test_output_and_loss_are_the_equations(gate, selector, tasks, padded):
    settings = {"gate": gate, "selector": selector, "tasks": tasks}
    compare(make(padded=padded, **settings), padded, **settings)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("padded", [True, False])
def test_gradients_are_the_finite_differences(gate, selector, padded):
    update, x, weight = make(gate=gate, selector=selector, padded=padded), inputs().requires_grad_(), 0.7
    coefficients = torch.randn(ROWS, LENGTH, OUT, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    update.context.weight.fill_(weight)
    (update(x) * coefficients).sum().backward()
    found = tensors(update) | {"x": x.detach().numpy().copy()}

    def loss_of() -> float:
        h, l1, _ = reference(found, found["x"], counted(padded), update.config)
        return (h * coefficients.numpy()).sum() + weight * l1

    for name, parameter in [*update.named_parameters(), ("x", x)]:
        slope, entries = np.zeros(parameter.numel()), found[name].reshape(-1)
        for i in range(len(entries)):
            here, ends = entries[i], []
            for step in (1e-6, -1e-6):
                entries[i] = here + step
                ends.append(loss_of())
            entries[i] = here
            slope[i] = (ends[0] - ends[1]) / 2e-6
        gradient = parameter.grad.numpy().reshape(-1)
        assert np.linalg.norm(gradient - slope) <= 1e-5 * max(np.linalg.norm(slope), 1e-3), name
        assert np.abs(gradient).max() > 0, name


# --- faults that the reference must see -----------------------------------------------------------------------------


class Swapped(AMLoRAUpdate):
    def token_scores(self, z, B):
        return super().token_scores(z, B).flip(-1)


class Unbent(AMLoRAUpdate):
    def token_scores(self, z, B):
        v, c = self.heads()
        return self.scaling * (z * (B * v[..., None]).sum(1)).sum(-1) + c


class Unscaled(AMLoRAUpdate):
    def token_scores(self, z, B):
        return super().token_scores(z / self.scaling, B)


class Biasless(AMLoRAUpdate):
    def heads(self):
        v, c = super().heads()
        return v, 0 * c


class Uniform(AMLoRAUpdate):
    def token_scores(self, z, B):
        return super().token_scores(z, B) * 0


class Normed(AMLoRAUpdate):
    def sparsity(self, score, x):
        return super().sparsity(score.softmax(-1), x)


def unscaled(update):
    update.scaling = 1.0


def all_real(update):
    update.context.padding = None


def forgetful(update):
    update.B_old[0] = 0


@pytest.mark.parametrize("kind", [Swapped, Unbent, Unscaled, Biasless, Uniform, Normed])
def test_a_faulty_update_does_not_pass(kind):
    with pytest.raises(AssertionError):
        compare(make(kind))


@pytest.mark.parametrize("fault", [unscaled, all_real, forgetful])
@pytest.mark.parametrize("gate", GATES)
def test_a_spoilt_update_does_not_pass(fault, gate):
    fault(update := make(gate=gate))
    with pytest.raises(AssertionError):
        compare(update, gate=gate)


# --- one layer ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", GATES)
def test_with_one_task_it_is_lora(gate):
    update, x = make(tasks=1, gate=gate), inputs()
    torch.testing.assert_close(update(x), update.scaling * x @ update.A.T @ update.B.T)
    assert total(update, x) == 0
    assert not update.v.grad.any()


def test_at_the_start_it_adds_nothing():
    assert not AMLoRAUpdate(AMLoRAConfig(), HERE, Context(), nn.Linear(IN, OUT))(inputs().float()).any()


@pytest.mark.parametrize("gate", GATES)
def test_tokens_that_are_in_no_rows_are_weighed_too(gate):
    update, x = make(gate=gate, padded=False), inputs()
    torch.testing.assert_close(update(x.flatten(0, 1)), update(x).flatten(0, 1))


def test_scores_are_in_full_precision_under_autocast():
    update = make().float()
    z, B = torch.randn(ROWS, LENGTH, 3, R), torch.randn(3, OUT, R)
    with torch.autocast("cpu", torch.bfloat16):
        found = update.token_scores(z, B)
    assert torch.equal(found, update.token_scores(z, B))


def test_an_evaluation_changes_no_state():
    update = make().eval()
    before = tensors(update)
    update(inputs())
    assert all(np.array_equal(before[key], value) for key, value in tensors(update).items())
    assert not update.noted


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("tasks", [1, 3])
def test_the_jump_at_a_switch_is_equation_5(gate, selector, tasks):
    update, x = make(gate=gate, selector=selector, tasks=tasks), inputs()
    before = update(x).detach().numpy()
    _, _, gates = reference(tensors(update), x.numpy(), counted(True), update.config)
    old = tensors(update)
    update.append()
    _, _, new = reference(tensors(update), x.numpy(), counted(True), update.config)
    share = 1 - new[..., -1, :]  # Z / (Z + 1)
    np.testing.assert_allclose(update(x).detach().numpy(), share * before, rtol=1e-9)
    assert (share >= tasks / (tasks + 1) - 1e-12).all()
    np.testing.assert_allclose(new[..., :-1, :], share[..., None, :] * gates, rtol=1e-9)
    assert np.array_equal(update.A_old[-1].numpy(), old["A"])
    assert np.array_equal(update.B_old[-1].numpy(), old["B"])
    assert not update.B.any()
    assert update.A.dtype == update.v.dtype == torch.float64


@pytest.mark.parametrize("gate", GATES)
def test_a_lora_from_elsewhere_joins_by_equation_5(gate):
    update, x = make(gate=gate), inputs()
    before, newest = update(x).detach().numpy(), tensors(update)
    a, b = torch.randn(R, IN, dtype=torch.float64), torch.randn(OUT, R, dtype=torch.float64)
    update.append((a, b))
    _, _, gates = reference(tensors(update), x.numpy(), counted(True), update.config)
    share = gates[..., -2, :]  # of the one that joined: exp(u') / (Z + exp(u'))
    joined = update.scaling * (x @ a.T @ b.T).numpy()
    np.testing.assert_allclose(update(x).detach().numpy(), (1 - share) * before + share * joined, rtol=1e-9)
    for key in ("A", "B"):
        assert np.array_equal(getattr(update, key).detach().numpy(), newest[key])
    assert np.array_equal(update.v[-1].detach().numpy(), newest["v"][-1])


@pytest.mark.parametrize(
    "wrong",
    [{"tasks": []}, {"gate": "element"}, {"selector": "old"}, {"l1_weight": -1.0}, {"l1_weight": float("nan")}],
    ids=str,
)
def test_config_says_what_is_wrong(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        AMLoRAConfig(**wrong)


# --- a model --------------------------------------------------------------------------------------------------------


def learn(model, steps: int = 3) -> None:
    """Some steps whose optimizer would move whatever it holds."""
    train(model, [texts()] * steps, torch.optim.AdamW(trained(model), lr=2e-2, weight_decay=0.5))


def first(**settings):
    """A model that has learned its first task."""
    model, _ = start("llama", "am_lora", tasks=["one"], **settings)
    learn(model)
    return model


def answers(model) -> torch.Tensor:
    return logits(model.eval(), {"input_ids": texts()[0]["input_ids"]})


@pytest.mark.parametrize("selector", SELECTORS)
def test_what_was_learned_stays_bit_for_bit_while_the_next_task_is_trained(selector):
    model = first(selector=selector)
    learned = weights(model)
    for number, task in enumerate(["two", "three"]):
        before = weights(model)
        add_task(model, task)
        assert model.peft_config["default"].tasks[-1] == task
        learn(model)
        after = weights(model)
        for name in updates(model):
            for key in ("A", "B"):
                assert torch.equal(after[f"{name}.{key}_old"][0], learned[f"{name}.{key}"])
                assert torch.equal(after[f"{name}.{key}_old"][-1], before[f"{name}.{key}"])
                assert not torch.equal(after[f"{name}.{key}"], before[f"{name}.{key}"])
            assert after[f"{name}.A_old"].shape[0] == number + 1
            if selector == "new":
                assert torch.equal(after[f"{name}.v_old"][-1:], before[f"{name}.v"])
            else:
                assert not torch.equal(after[f"{name}.v"][:-1], before[f"{name}.v"])


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sequence_comes_back_bit_for_bit(selector, dtype, tmp_path):
    base = pico.build("llama")[0].to(dtype)
    model = adapt(base, "am_lora", tasks=["one"], selector=selector)
    learn(model)
    add_task(model, "two")
    learn(model)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["tasks"] == ["one", "two"]
    for trainable in (True, False):
        again = lorasculpt.load(pico.build("llama")[0].to(dtype), tmp_path, trainable=trainable)
        assert lorasculpt.adapters.tasks._sequence(again, "default").tasks == ["one", "two"]
        found, expected = weights(again), weights(model)
        assert all(torch.equal(found[key], value) and value.dtype == torch.float32 for key, value in expected.items())
        assert torch.equal(answers(again), answers(model))
        add_task(again, "three")
        assert all(parameter.requires_grad == trainable for n, parameter in again.named_parameters() if "lora_" in n)


def test_the_jump_in_a_model_is_that_of_its_first_lora_at_half_its_strength():
    """With heads at 0 every layer's LoRA counts half: by (5), measured on the answers of the whole model."""
    model = first()
    for update in updates(model).values():
        nn.init.zeros_(update.v)
        nn.init.zeros_(update.c)
    before = answers(model)
    with model.disable_adapter():
        base = answers(model)
    add_task(model, "two")
    for update in updates(model).values():
        nn.init.zeros_(update.v)
    after = answers(model)
    for update in updates(model).values():
        update.scaling *= 2
    torch.testing.assert_close(answers(model), before, rtol=1e-4, atol=1e-5)
    jump = float((after - before).norm() / (before - base).norm())
    assert 0.3 < jump < 0.7


def stock(folder, base, **settings):
    """A LoRA trained with stock PEFT, saved in ``folder``."""
    targets = adapt(pico.build("llama")[0], "am_lora").peft_config["default"].target_modules
    model = get_peft_model(base, LoraConfig(**{"r": 2, "lora_alpha": 8, "target_modules": targets} | settings))
    optimizer = torch.optim.AdamW(trained(model), lr=2e-2)
    for batch in texts(number=3):
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True, "lora_alpha": 5}], ids=["plain", "rslora"])
def test_a_lora_of_stock_peft_joins(settings, tmp_path):
    expected = answers(stock(tmp_path, pico.build("llama")[0], **settings))
    model = start("llama", "am_lora", tasks=["mine"])[0]
    newest = weights(model)
    add_task(model, "theirs", tmp_path)
    assert model.peft_config["default"].tasks == ["theirs", "mine"]
    for update in updates(model).values():
        assert torch.equal(update.A, newest[f"{update.place.name}.A"])
        update.c.data[0] = 1e4  # all attention to theirs
    torch.testing.assert_close(answers(model), expected, rtol=1e-4, atol=1e-5)
    theirs = weights(model)
    learn(model)
    add_task(model, "more")
    learn(model)
    found = weights(model)
    for name in updates(model):
        assert torch.equal(found[f"{name}.B_old"][0], theirs[f"{name}.B_old"][0])
        assert len(found[f"{name}.B_old"]) == 2


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"r": 3}, "the same r"),
        ({"target_modules": ["q_proj"]}, "the same target_modules"),
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "holds more than a LoRA"),
        ({"init_lora_weights": "pissa"}, "other base weights"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_lora_that_does_not_fit_is_refused_and_nothing_changes(settings, part, tmp_path):
    stock(tmp_path, pico.build("llama")[0], **settings)
    model = first()
    before = weights(model)
    with pytest.raises(UserError, match=part):
        add_task(model, "theirs", tmp_path)
    assert model.peft_config["default"].tasks == ["one"]
    assert before.keys() == weights(model).keys()
    assert all(torch.equal(before[key], value) for key, value in weights(model).items())


def test_a_switch_that_makes_no_sense_is_refused(tmp_path):
    model = start("llama", "am_lora", tasks=["one"], selector="new")[0]
    for name in ("one", ""):
        with pytest.raises(UserError, match="a name of its own"):
            add_task(model, name)
    with pytest.raises(UserError, match="holds no adapter"):
        add_task(model, "two", tmp_path / "nowhere")
    stock(tmp_path, pico.build("llama")[0])
    with pytest.raises(UserError, match="selector"):
        add_task(model, "two", tmp_path)
    with pytest.raises(UserError, match="learns tasks one after the other"):
        add_task(model, "two", adapter="other")
    sculpted = get_peft_model(pico.build("llama")[0], LoRASculptConfig(target_modules=["q_proj"]))
    with pytest.raises(UserError, match="is of the method lorasculpt"):
        add_task(sculpted, "two")
    with pytest.raises(UserError, match="none of this library's"):
        add_task(pico.build("llama")[0], "two")
