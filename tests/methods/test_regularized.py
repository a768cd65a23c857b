from __future__ import annotations

import json
import math

import numpy as np
import pico
import pytest
import torch
from contract import adapt, equal, masks, start, texts, train, weights
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import lorasculpt
from lorasculpt import Clock, RegularizedConfig, UserError, method_logs
from lorasculpt.adapters.fisher import save_fisher
from lorasculpt.adapters.layers import sites
from lorasculpt.adapters.method import methods_of
from lorasculpt.methods import regularized
from lorasculpt.models.parts import target_regex

WEIGHT = 0.7
FEATURES = {"first": (5, 4), "second": (4, 6)}


class Net(nn.Module):
    """Two linears, neither of them square."""

    def __init__(self):
        super().__init__()
        self.first, self.second = (nn.Linear(*features) for features in FEATURES.values())

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def net(penalty="l2", **settings):
    """``Net`` with a regularized LoRA of rank 2 and alpha 6 whose B is not 0."""
    torch.manual_seed(0)
    settings = {"r": 2, "lora_alpha": 6, "weight": WEIGHT, "target_modules": list(FEATURES)} | settings
    model = get_peft_model(Net(), RegularizedConfig(penalty=penalty, **settings))
    with torch.no_grad():
        for site in sites(model).values():
            site.b.weight.normal_()
    return model


def plain(folder, seed=3, targets=tuple(FEATURES), base=None):
    """The folder of a plain LoRA of rank 3, as of an earlier task."""
    torch.manual_seed(seed)
    model = get_peft_model(base or Net(), LoraConfig(r=3, target_modules=list(targets)))
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def earlier(tmp_path):
    """Two earlier LoRAs; the second adapts one linear alone."""
    return [plain(tmp_path / "a"), plain(tmp_path / "b", 4, ["second"])]


def fisher_of(model, path, seed=5) -> str:
    """A file of numbers from 1e-12 to 1e-6 for every linear that ``model`` adapts."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: site.weight().shape for name, site in sites(model).items()}
    save_fisher(
        path, {name: 10 ** (-12 + 6 * torch.rand(shape, generator=generator)) for name, shape in shapes.items()}
    )
    return str(path)


@pytest.fixture
def fisher(tmp_path):
    return fisher_of(net(), tmp_path / "fisher.safetensors")


@pytest.fixture(params=["l2", "orth", "olora", "ewc"])
def penalty(request):
    return request.param


def given(penalty, earlier, fisher):
    """What a penalty needs to be given."""
    return {"olora": {"earlier": earlier}, "ewc": {"fisher": fisher}}.get(penalty, {})


@pytest.fixture
def model(penalty, earlier, fisher):
    return net(penalty, **given(penalty, earlier, fisher))


# --- value and gradient, in numpy -----------------------------------------------------------------------------------


def double(tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def read(folders, name):
    """The A of every folder that adapts ``name``."""
    key = f"base_model.model.{name}.lora_A.weight"
    files = [load_file(f"{folder}/adapter_model.safetensors") for folder in folders]
    return [double(file[key]) for file in files if key in file]


def read_F(file, scale="mean") -> dict[str, np.ndarray]:
    """F of every linear in ``file``: with a mean of 1 over all, or as it was before it was written."""
    with safe_open(file, "pt") as kept:
        raw = json.loads(kept.metadata()["lorasculpt.fisher"])["mean"]
        found = {name: double(kept.get_tensor(name)) for name in kept.keys()}  # noqa: SIM118
    mean = np.concatenate([F.ravel() for F in found.values()]).mean()
    return {name: F * raw if scale == "raw" else F / mean for name, F in found.items()}


def value(penalty, W, B, A, scaling, olds) -> float:
    """Equations (2) to (5) as they are written, with the whole D; ``olds`` is F for (5)."""
    if penalty == "olora":
        return sum(abs(row @ old) for A_i in olds for row in A for old in A_i)
    D = scaling * B @ A
    if penalty == "l2":
        return sum(d * d for d in D.ravel())
    if penalty == "ewc":
        return 0.5 * sum(f * d * d for f, d in zip(olds.ravel(), D.ravel(), strict=True))
    return W.shape[0] / (W**2).sum() * (np.einsum("mi,mj->ij", W, D) ** 2).sum()


def expected(model, penalty, folders=(), F=None):
    """(value, {parameter: gradient of lambda R}), by central differences over every entry."""
    total, found = 0.0, {}
    for name, site in sites(model).items():
        W, B, A = double(site.weight()), double(site.B), double(site.A)
        fixed = site.scaling, F[name] if penalty == "ewc" else read(folders, name)
        total += value(penalty, W, B, A, *fixed)
        for leaf, matrix in ((site.b.weight, B), (site.a.weight, A)):
            gradient = np.zeros_like(matrix)
            for at in np.ndindex(matrix.shape):
                kept, sides = matrix[at], []
                for step in (1e-5, -1e-5):
                    matrix[at] = kept + step
                    sides.append(value(penalty, W, B, A, *fixed))
                matrix[at] = kept
                gradient[at] = WEIGHT * (sides[0] - sides[1]) / 2e-5
            found[leaf] = gradient
    return total, found


def check(model, penalty, folders, F=None):
    method = methods_of(model)["default"]
    method.begin(None)
    found = method.penalties()
    total, gradients = expected(model, penalty, folders, F)
    assert method.logs()["penalty"] == pytest.approx(total, rel=1e-5)
    assert found.keys() == gradients.keys()
    for leaf, gradient in gradients.items():
        np.testing.assert_allclose(double(found[leaf]), gradient, rtol=1e-4, atol=1e-4 * np.abs(gradient).max())


@pytest.mark.parametrize("rows", [1024, 3])
def test_value_and_gradient_are_those_of_the_equations(model, penalty, earlier, fisher, rows, monkeypatch):
    monkeypatch.setattr(regularized, "ROWS", rows)
    check(model, penalty, earlier, read_F(fisher))


def test_fisher_information_is_divided_by_its_mean_or_not(fisher):
    check(net("ewc", fisher=fisher, fisher_scale="raw"), "ewc", (), read_F(fisher, "raw"))
    first = read_F(fisher)["first"]
    assert abs(first.mean() - 1) > 0.01
    check(net("ewc", fisher=fisher, target_modules=["first"]), "ewc", (), {"first": first / first.mean()})


def test_where_all_weights_tell_as_much_ewc_is_half_of_l2(tmp_path):
    save_fisher(tmp_path / "f", {name: torch.full(shape[::-1], 3e-9) for name, shape in FEATURES.items()})
    found = []
    for settings in ({"penalty": "ewc", "fisher": tmp_path / "f", "weight": 2 * WEIGHT}, {"penalty": "l2"}):
        method = methods_of(net(**settings))["default"]
        method.begin(None)
        found.append([*method.penalties().values(), torch.tensor(method.logs()["penalty"])])
    torch.testing.assert_close(found[0][:-1], found[1][:-1])
    torch.testing.assert_close(2 * found[0][-1], found[1][-1])


def unscaled(method, site, B, A):
    return regularized._quadratic(B, B, A, 1.0)


def not_squared(*given):
    return [part**0.5 for part in regularized.l2(*given)]


def by_inputs(method, site, B, A):
    """Of W0 D' in place of W0' D."""
    W = site.weight()
    C = W.T @ W * W.shape[0] / W.square().sum()
    size, grad_A, grad_B = regularized._quadratic(C @ A.T, A.T, B.T, site.scaling)
    return size, grad_B.T, grad_A.T


def not_scaled(method, site, B, A):
    W = site.weight()
    return regularized._quadratic(W @ (W.T @ B), B, A, site.scaling)


def only_of_A(*given):
    size, grad_B, grad_A = regularized.orth(*given)
    return size, 0 * grad_B, grad_A


def the_last_alone(method, site, B, A):
    last = method.earlier[site.name][-3:]
    return (A @ last.T).abs().sum(), 0 * B, (A @ last.T).sign() @ last


def squares(method, site, B, A):
    old = method.earlier[site.name]
    return (A @ old.T).square().sum(), 0 * B, 2 * A @ old.T @ old


def _of(F_of):
    """EWC with another F."""

    def fault(method, site, B, A):
        right = method.fisher[site.name]
        method.fisher[site.name] = F_of(right.float())
        found = regularized.ewc(method, site, B, A)
        method.fisher[site.name] = right
        return found

    return fault


def not_halved(*parts):
    size, grad_B, grad_A = regularized.ewc(*parts)
    return 2 * size, 2 * grad_B, 2 * grad_A


def scaled_once(method, site, B, A):
    size, grad_B, grad_A = regularized.ewc(method, site, B, A)
    return size, grad_B / site.scaling, grad_A / site.scaling


def not_divided(method, site, B, A):
    method.factor = 1.0
    return regularized.ewc(method, site, B, A)


root, flat = _of(torch.sqrt), _of(torch.ones_like)

FAULTS = {
    root: "ewc",
    flat: "ewc",
    not_halved: "ewc",
    scaled_once: "ewc",
    not_divided: "ewc",
    unscaled: "l2",
    not_squared: "l2",
    by_inputs: "orth",
    not_scaled: "orth",
    only_of_A: "orth",
    the_last_alone: "olora",
    squares: "olora",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_caught(fault, earlier, fisher, monkeypatch):
    penalty = FAULTS[fault]
    monkeypatch.setitem(regularized.PENALTIES, penalty, fault)
    targets = ["first"] if fault is not_divided else list(FEATURES)  # the file's own mean is 1 over both
    F = read_F(fisher)
    F |= {"first": F["first"] / F["first"].mean()} if fault is not_divided else {}
    model = net(penalty, **given(penalty, earlier, fisher), target_modules=targets)
    with pytest.raises(AssertionError):
        check(model, penalty, earlier, F)


def test_at_the_start_l2_orth_and_ewc_have_nothing_to_say(fisher):
    for penalty in ("l2", "orth", "ewc"):
        model = net(penalty, **given(penalty, [], fisher))
        for site in sites(model).values():
            nn.init.zeros_(site.b.weight)
        method = methods_of(model)["default"]
        method.begin(None)
        assert not any(grad.any() for grad in method.penalties().values())
        assert method.logs() == {"penalty": 0.0}


def test_orth_weighs_the_directions_of_the_output_by_what_the_base_writes_into_them():
    model = net("orth", target_modules=["first"])
    (site,) = sites(model).values()
    method, weight = methods_of(model)["default"], site.base.weight
    with torch.no_grad():
        nn.init.orthogonal_(weight)  # the same in every direction: Orth-Reg is L2-Reg
    found = method.penalties()
    for leaf, gradient in expected(model, "l2")[1].items():
        np.testing.assert_allclose(double(found[leaf]), gradient, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        weight[2:] = 0
        site.b.weight[:2] = 0  # the update writes where the base does not
    method.norms.clear()
    assert not method.penalties()[site.a.weight].any()
    assert method.logs()["penalty"] == 0
    with torch.no_grad():
        weight.zero_()
    method.norms.clear()
    assert not any(gradient.any() for gradient in method.penalties().values())


# --- training -------------------------------------------------------------------------------------------------------


def backward(model, micro_batches):
    """Gradients of a window of micro-batches, and what is shown after the step."""
    x = torch.linspace(-1, 1, 5 * 6).view(6, 5)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    clock = Clock(model, optimizer, accumulation=micro_batches)
    clock.begin_step()
    for part in x.chunk(micro_batches):
        (model(part).square().sum() / micro_batches).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    optimizer.step()
    clock.end_step()
    clock.close()
    return found, method_logs(model)


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_it_counts_once_in_an_optimizer_step_and_is_logged(model, penalty, earlier, fisher, micro_batches):
    with_it, logs = backward(model, micro_batches)
    without, nothing = backward(net(penalty, weight=0.0, **given(penalty, earlier, fisher)), micro_batches)
    total, gradients = expected(model, penalty, earlier, read_F(fisher))
    names = {parameter: name for name, parameter in model.named_parameters()}
    for leaf, gradient in gradients.items():
        added = double(with_it[names[leaf]]) - double(without[names[leaf]])
        np.testing.assert_allclose(added, gradient, rtol=1e-4, atol=1e-4 * np.abs(gradient).max())
    task = math.sqrt(sum(float(grad.square().sum()) for grad in without.values()))
    own = math.sqrt(sum((gradient**2).sum() for gradient in gradients.values()))
    assert logs == pytest.approx({"penalty": total, "penalty_ratio": own / task}, rel=1e-4)
    assert nothing == {}


@pytest.mark.parametrize("penalty", ["l2", "orth", "ewc"])
def test_with_weight_0_it_is_lora_bit_for_bit(penalty, tmp_path):
    base = pico.build("llama")[0]
    torch.manual_seed(1)
    lora = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=target_regex(base, "language")))
    settings = given(penalty, [], fisher_of(lora, tmp_path / "f"))
    model = adapt(pico.build("llama")[0], "regularized", penalty=penalty, weight=0.0, **settings)
    other = adapt(pico.build("llama")[0], "regularized", penalty=penalty, weight=1.0, **settings)
    for each in (lora, model, other):
        train(each, [texts()] * 3)
    assert equal(weights(model), weights(lora))
    assert not equal(weights(other), weights(lora))
    assert all(mask.all() for mask in masks(other).values())


@pytest.mark.parametrize("penalty", ["l2", "orth", "ewc"])
def test_a_larger_weight_leaves_a_smaller_update(penalty, tmp_path):
    sizes = []
    file = fisher_of(start("llama", "regularized")[0], tmp_path / "f")
    F = read_F(file)
    for weight in (0.0, 0.1, 1.0):
        model = start("llama", "regularized", penalty=penalty, weight=weight, **given(penalty, [], file))[0]
        train(model, [texts()] * 6)
        each = sites(model).values()
        sizes.append(sum(value(penalty, *map(double, (s.weight(), s.B, s.A)), s.scaling, F[s.name]) for s in each))
    assert sizes[0] > 1.02 * sizes[1] > 1.02**2 * sizes[2] > 0


def test_olora_turns_away_from_the_earlier_one(tmp_path):
    base = pico.build("llama")[0]
    folders = [plain(tmp_path, targets=["q_proj", "v_proj"], base=base)]
    overlaps = []
    for weight in (0.0, 0.1):
        model = start("llama", "regularized", penalty="olora", weight=weight, earlier=folders)[0]
        train(model, [texts()] * 6)
        overlaps.append(
            sum(value("olora", None, 0, double(s.A), 0, read(folders, name)) for name, s in sites(model).items())
        )
    assert overlaps[1] < 0.9 * overlaps[0]


# --- folders --------------------------------------------------------------------------------------------------------


def base() -> nn.Module:
    """The one that `net` adapts."""
    torch.manual_seed(0)
    return Net()


def test_what_comes_out_is_a_plain_lora(model, penalty, tmp_path):
    x, (folder, again) = torch.ones(1, 5), (tmp_path / "out", tmp_path / "again")
    model.save_pretrained(folder)
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert {key.rpartition(".lora_")[2] for key in load_file(folder / "adapter_model.safetensors")} == {
        "A.weight",
        "B.weight",
    }
    assert torch.equal(PeftModel.from_pretrained(base(), folder)(x), model(x))
    back = lorasculpt.load(base(), folder, trainable=True)
    assert back.peft_config["default"].settings() == model.peft_config["default"].settings()
    back.save_pretrained(again)
    assert torch.equal(lorasculpt.load(base(), again)(x), model(x))


def test_earlier_loras_are_needed_for_training_alone(tmp_path):
    model = net("olora", earlier=[tmp_path / "gone"])
    model.save_pretrained(tmp_path / "out")
    assert lorasculpt.load(base(), tmp_path / "out")(torch.ones(1, 5)).isfinite().all()
    with pytest.raises(UserError, match=r"gone, which holds no adapter: there is no adapter_model\.safetensors\.$"):
        Clock(model, torch.optim.SGD(model.parameters()))


@pytest.mark.parametrize("targets", [["second"], ["first"]], ids=["other linears", "another size"])
def test_an_earlier_lora_that_does_not_fit_is_refused(targets, tmp_path):
    base = Net()
    base.first = nn.Linear(7, 4)
    folder = plain(tmp_path, targets=targets, base=base)
    model = net("olora", earlier=[folder], target_modules=["first"])
    with pytest.raises(UserError, match="is no plain LoRA on linears that this one adapts"):
        Clock(model, torch.optim.SGD(model.parameters()))


def test_the_fisher_information_is_needed_for_training_alone(fisher, tmp_path):
    for settings, message in [
        ({}, r"^penalty='ewc' needs fisher, a file that .* makes; only lorasculpt train makes it by itself\.$"),
        ({"fisher": tmp_path / "gone"}, r"^fisher names \S+gone, which is no file; .*\.$"),
    ]:
        model = net("ewc", **settings)
        model.save_pretrained(tmp_path / "out")
        assert lorasculpt.load(base(), tmp_path / "out")(torch.ones(1, 5)).isfinite().all()
        with pytest.raises(UserError, match=message):
            Clock(model, torch.optim.SGD(model.parameters()))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"penalty": "l3"}, "penalty is one of l2, orth, olora, ewc; got 'l3'"),
        ({"fisher": "a"}, "fisher is for penalty='ewc'; got penalty='l2' and fisher='a'"),
        ({"penalty": "ewc", "fisher_texts": 0}, "fisher_texts is at least 1; got 0"),
        ({"penalty": "ewc", "fisher_scale": "max"}, "fisher_scale is 'mean' or 'raw'; got 'max'"),
        ({"penalty": "ewc", "init_lora_weights": "pissa"}, "does not support init_lora_weights='pissa'"),
        ({"weight": -1e-3}, "at least 0; got -0.001"),
        ({"weight": math.nan}, "got nan"),
        ({"weight": math.inf}, "got inf"),
        ({"penalty": "olora"}, "give both or neither; got penalty='olora' and earlier=None"),
        ({"earlier": ["a"]}, "give both or neither; got penalty='l2' and earlier=['a']"),
        ({"penalty": "olora", "earlier": "a"}, "earlier must be a list of texts or None; got 'a'"),
        ({"use_dora": True}, "does not support use_dora"),
    ],
)
def test_a_bad_value_is_refused_in_one_sentence(settings, message):
    with pytest.raises(ValueError, match=r"^[^\n]*\.$") as error:
        RegularizedConfig(**settings)
    assert message in str(error.value)
