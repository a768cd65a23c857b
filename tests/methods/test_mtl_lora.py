"""MTL-LoRA against its equations, written once more in numpy with loops, and the plain LoRA of each task."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from contract import TASKS, adapt, start, texts, train
from differences import check_gradients
from equations import drawn, normal, tensors
from torch import nn

from lorasculpt import MTLLoRAConfig, UserError
from lorasculpt.adapters.context import Context
from lorasculpt.adapters.update import Place, updates
from lorasculpt.methods.mtl_lora import MTLLoRAUpdate

ROWS, LENGTH, IN, OUT = 4, 3, 5, 4
NAMES = ["a", "b", "c"]
IDS = [2, 0, 2, 1]
REAL = torch.tensor([[0, 1, 1], [1, 1, 1], [0, 0, 1], [1, 1, 0]], dtype=torch.bool)
KINDS = [
    {"transform": transform, "num_b": num_b, "temperature": temperature}
    for transform in ("full", "diagonal")
    for num_b, temperature in ((1, 1.0), (3, 0.4))
]


def make(kind: type[MTLLoRAUpdate] = MTLLoRAUpdate, *, padded=False, **settings) -> MTLLoRAUpdate:
    """An update in float64 whose every tensor is random, in a batch of mixed tasks."""
    given = {"r": 2, "lora_alpha": 3, "lora_dropout": 0.0, "temperature": 0.4, "tasks": NAMES}
    context = Context()
    context.tasks, context.padding = torch.tensor(IDS), REAL if padded else None
    update = kind(MTLLoRAConfig(**given | settings), Place("here", IN, OUT), context, nn.Linear(IN, OUT)).double()
    return drawn(update)


def batch() -> torch.Tensor:
    return normal(ROWS, LENGTH, IN)


# --- the reference --------------------------------------------------------------------------------------------------


def delta(t, config, task):
    """(out, in) the update of one task."""
    e = np.exp(t["w"][task] / config.temperature)
    up = np.zeros((OUT, config.r))
    for i in range(config.num_b):
        up += e[i] / e.sum() * t["B"][i]
    own = np.diag(t["Lambda"][task]) if config.transform == "diagonal" else t["Lambda"][task]
    return config.lora_alpha / config.r * up @ own @ t["A"]


def reference(t, x, config):
    """h - W0 x."""
    h = np.zeros((*x.shape[:2], OUT))
    for row in range(len(x)):
        for i in range(x.shape[1]):
            h[row, i] = delta(t, config, IDS[row]) @ x[row, i]
    return h


def compare(update: MTLLoRAUpdate, **settings) -> None:
    """Fails unless ``update`` gives what the equations give under the config of ``make(**settings)``."""
    right = make(**settings)
    expected = reference(tensors(right), batch().numpy(), right.config)
    np.testing.assert_allclose(update(batch()).detach().numpy(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("settings", KINDS, ids=str)
@pytest.mark.parametrize("padded", [True, False])
def test_output_is_the_equations(settings, padded):
    compare(make(padded=padded, **settings), **settings)


def differentiate(update: MTLLoRAUpdate) -> None:
    """Fails unless the gradients of ``update`` are the slopes of the equations."""
    x = batch().requires_grad_()
    c = torch.randn(ROWS, LENGTH, OUT, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    (update(x) * c).sum().backward()
    values = tensors(update) | {"x": x.detach().numpy().copy()}

    def total() -> float:
        return (reference(values, values["x"], update.config) * c.numpy()).sum()

    trained = dict(update.named_parameters())
    if update.config.num_b == 1:  # nothing to weigh
        assert float(trained.pop("w").grad.abs().max()) < 1e-12
    check_gradients([*trained.items(), ("x", x)], values, total)


@pytest.mark.parametrize("settings", KINDS, ids=str)
@pytest.mark.parametrize("padded", [True, False])
def test_gradients_are_the_finite_differences(settings, padded):
    differentiate(make(padded=padded, **settings))


# --- faults that the reference must see -----------------------------------------------------------------------------


class OtherTask(MTLLoRAUpdate):
    def task_ids(self, x):
        return super().task_ids(x).flip(0)


class OneTask(MTLLoRAUpdate):
    def task_ids(self, x):
        return super().task_ids(x)[:1].expand(len(x))


class Swapped(MTLLoRAUpdate):
    def shares(self):
        return super().shares().flip(-1)


class Alike(MTLLoRAUpdate):
    def shares(self):
        return torch.ones_like(super().shares()) / self.config.num_b


class NoSoftmax(MTLLoRAUpdate):
    def shares(self):
        return self.w


class Transposed(MTLLoRAUpdate):
    def transforms(self):
        return super().transforms().mT


class NoTransform(MTLLoRAUpdate):
    def transforms(self):
        return torch.eye(self.r, dtype=self.A.dtype).expand_as(super().transforms())


class Unscaled(MTLLoRAUpdate):
    def __init__(self, *given):
        super().__init__(*given)
        self.scaling = 1.0


FAULTS = (OtherTask, OneTask, Swapped, Alike, NoSoftmax, Transposed, NoTransform, Unscaled)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_update_does_not_pass(fault):
    with pytest.raises(AssertionError):
        compare(make(fault))


class Detached(MTLLoRAUpdate):
    def shares(self):
        return super().shares().detach()


def test_weights_that_learn_nothing_are_seen_by_their_gradient_alone():
    compare(make(Detached))
    with pytest.raises(AssertionError, match=r"^w$"):
        differentiate(make(Detached))


def test_another_temperature_does_not_pass():
    with pytest.raises(AssertionError):
        compare(make(temperature=1.0), temperature=0.4)


# --- the plain LoRA of a task ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [*KINDS, {"use_rslora": True}], ids=str)
def test_of_one_task_it_is_a_plain_lora(settings):
    update, x = make(**settings), batch()
    output = update(x)
    for row, task in enumerate(IDS):
        a, b = update.factors(task)
        assert (a.shape, b.shape) == ((2, IN), (OUT, 2))
        torch.testing.assert_close(output[row], x[row] @ (b @ a).mT)
        torch.testing.assert_close(update.weight(task), b @ a)
    if not settings.get("use_rslora"):
        np.testing.assert_allclose(b.detach() @ a.detach(), delta(tensors(update), update.config, task), rtol=1e-5)
    with pytest.raises(ValueError, match="say which task: one of a, b, c"):
        update.factors()


def test_in_a_model_the_matrix_of_a_task_answers_as_the_adapter_does():
    model, _ = start("llama", "mtl_lora")
    (example,) = texts()
    train(model, [[example]] * 3, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2))
    for number, task in enumerate(TASKS):
        with torch.no_grad():
            expected = model(input_ids=example["input_ids"], task=task).logits
            merged = start("llama", "mtl_lora")[0].unload()
            for name, update in updates(model).items():
                merged.get_submodule(name).weight += update.weight(number)
            torch.testing.assert_close(merged(example["input_ids"]).logits, expected, rtol=1e-4, atol=1e-5)


def test_samples_of_several_tasks_are_as_in_batches_of_their_own():
    update, x = make(), batch()
    together = update(x)
    for row, task in enumerate(IDS):
        update.context.tasks = NAMES[task]
        torch.testing.assert_close(update(x[row : row + 1])[0], together[row])


# --- special cases --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transform", ["full", "diagonal"])
def test_it_starts_as_a_lora_that_adds_nothing(transform):
    update = make(MTLLoRAUpdate, transform=transform)
    fresh = MTLLoRAUpdate(update.config, update.place, update.context, nn.Linear(IN, OUT))
    assert not fresh(batch().float()).any()
    assert torch.equal(fresh.transforms(), torch.eye(2).expand(3, 2, 2))
    assert len(fresh.w.unique()) == fresh.w.numel()


def test_with_one_task_and_one_b_it_is_plain_lora():
    update = make(tasks=["only"], num_b=1)
    update.context.tasks = "only"
    nn.init.eye_(update.Lambda.data[0])
    torch.testing.assert_close(update(batch()), update.scaling * batch() @ update.A.mT @ update.B[0].mT)


@pytest.mark.parametrize(("w_init", "alike"), [("kaiming", False), ("equal", True)])
def test_weights_that_start_alike_keep_all_b_alike(w_init, alike):
    model = adapt(start("llama", "mtl_lora")[0].unload(), "mtl_lora", w_init=w_init)
    train(model, [texts()] * 3)
    (update, *_) = updates(model).values()
    assert update.B.any()
    assert torch.allclose(update.B[0], update.B[1], atol=1e-7) == alike


def test_a_task_without_samples_gets_no_gradient_of_its_own():
    update = make()
    update.context.tasks = torch.tensor([2, 0, 2, 0])
    update(batch()).sum().backward()
    for own in (update.Lambda, update.w):
        assert [bool(gradient.any()) for gradient in own.grad] == [True, False, True]


def test_tokens_that_are_not_in_rows_are_of_one_task():
    update, x = make(), batch()
    with pytest.raises(UserError, match="one task in a batch"):
        update(x[0])
    update.context.tasks = ["c"] * ROWS
    torch.testing.assert_close(update(x.flatten(0, 1)), update(x).flatten(0, 1))


def test_shares_are_noted_in_the_backward_pass_and_seen_by_a_recorder():
    update, seen = make(padded=True).train(), {}
    update.context.recorder = lambda name, load, tasks: seen.update({name: (load, tasks)})
    update(batch()).sum().backward()
    expected = update.shares()[IDS]
    torch.testing.assert_close(update.noted["load"], expected.sum(0))
    assert update.noted["tokens"] == ROWS
    assert torch.equal(seen["here"][0], expected)
    assert seen["here"][1].tolist() == IDS


def test_an_evaluation_changes_no_state():
    update = make().eval()
    before = tensors(update)
    update(batch())
    assert all(np.array_equal(before[key], value) for key, value in tensors(update).items())
    assert not update.noted


def test_shares_are_in_full_precision_under_autocast():
    update = make(temperature=0.1).to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        share = update.shares()
    expected = (update.w.double() / 0.1).softmax(-1)
    torch.testing.assert_close(share.double(), expected, rtol=1e-5, atol=1e-7)


def test_a_model_wants_a_known_task():
    model, _ = start("llama", "mtl_lora")
    (example,) = texts()
    with pytest.raises(UserError, match="needs the task of every sample"):
        model(**example)
    with pytest.raises(UserError, match="there is no task 'prime'"):
        model(**example, task="prime")
    assert torch.isfinite(model(**example, task=list(TASKS)).loss)


@pytest.mark.parametrize(
    "wrong",
    [{"tasks": []}, {"num_b": 0}, {"temperature": 0.0}, {"transform": "low rank"}, {"w_init": "uniform"}],
    ids=lambda wrong: next(iter(wrong)),
)
def test_config_says_what_is_wrong(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        MTLLoRAConfig(**{"tasks": NAMES} | wrong)
