"""AM-LoRA against its equations, written once more in numpy with loops, and its switch from task to task."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from differences import check_gradients
from equations import all_real, drawn, normal, tensors, unscaled
from torch import nn

from lorasculpt import AMLoRAConfig
from lorasculpt.adapters.context import Context
from lorasculpt.adapters.update import Place
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
    return drawn(update)


def inputs() -> torch.Tensor:
    return normal(ROWS, LENGTH, IN)


# --- the reference --------------------------------------------------------------------------------------------------


def softmax(u):
    e = np.exp(u - u.max())
    return e / e.sum()


def reference(t, x, real, config):
    """(h - W0 x, the L1 term, the weights of every token) of the equations."""
    loras = [*zip(t.get("A_old", ()), t.get("B_old", ()), strict=True), (t["A"], t["B"])]
    heads = list(zip(t["v"], t["c"], strict=True))
    if config.selector == "new":
        heads = [*zip(t.get("v_old", ()), t.get("c_old", ()), strict=True), *heads]
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


def differentiate(update: AMLoRAUpdate, padded=True) -> None:
    """Fails unless the gradients of ``update`` are the slopes of the equations."""
    x, weight = inputs().requires_grad_(), 0.7
    c = torch.randn(ROWS, LENGTH, OUT, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    update.context.weight.fill_(weight)
    (update(x) * c).sum().backward()
    values = tensors(update) | {"x": x.detach().numpy().copy()}

    def loss_of() -> float:
        h, l1, _ = reference(values, values["x"], counted(padded), update.config)
        return (h * c.numpy()).sum() + weight * l1

    trained = [(name, parameter) for name, parameter in update.named_parameters() if parameter.requires_grad]
    assert {name for name, _ in trained} == {"A", "B", "v", "c"}
    check_gradients([*trained, ("x", x)], values, loss_of)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("padded", [True, False])
def test_gradients_are_the_finite_differences(gate, selector, padded):
    differentiate(make(gate=gate, selector=selector, padded=padded), padded)


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


class Detached(AMLoRAUpdate):
    def token_scores(self, z, B):
        return super().token_scores(z.detach(), B.detach())


class Headless(AMLoRAUpdate):
    def heads(self):
        return tuple(head.detach() for head in super().heads())


@pytest.mark.parametrize(("kind", "missed"), [(Detached, "A"), (Headless, "v")])
def test_scores_that_are_learned_in_part_are_seen_by_gradients_alone(kind, missed):
    compare(make(kind))
    with pytest.raises(AssertionError, match=f"^{missed}$"):
        differentiate(make(kind))


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
