from __future__ import annotations

import numpy as np
import pico
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode

from lorasculpt.errors import UserError
from lorasculpt.posthoc import model_tailor, moments_of, read, tailor, write

OUT, IN = 6, 20


def layer(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Base weight, tuned weight and correlated inputs, (tokens, IN)."""
    random = torch.Generator().manual_seed(seed)
    before, delta = torch.randn(2, OUT, IN, generator=random)
    mix = torch.randn(IN, IN, generator=random) + 2  # positive correlations
    return before, before + 0.3 * delta, torch.randn(300, IN, generator=random) @ mix


def moment(x: torch.Tensor) -> torch.Tensor:
    return x.T @ x / len(x)


def by_elimination(before, after, moment, keep, block, sign=-1):
    """The same from the inverse itself, out of which each column is eliminated when it is done."""
    base, weight, H = (np.array(x, dtype=float) for x in (before, after, moment))
    H[np.diag_indices(IN)] += 0.01 * np.diag(H).mean()
    inverses, h = [], np.linalg.inv(H)
    for j in range(IN):
        inverses.append(h)
        h = h - np.outer(h[:, j], h[j]) / h[j, j]
    changes, found = np.abs(weight - base), base.copy()

    def z(x):
        return (x - x.mean(1, keepdims=True)) / x.std(1, ddof=1, keepdims=True)

    for start in range(0, IN, block):
        columns = np.arange(start, min(start + block, IN))
        saliency = weight[:, columns] ** 2 / np.array([inverses[j][j, j] for j in columns])
        score = 0.5 * z(changes[:, columns]) + 0.5 * z(saliency)
        kept = score >= np.sort(score.ravel())[::-1][int(keep * score.size) - 1]
        for i, j in enumerate(columns):
            found[:, j] = np.where(kept[:, i], weight[:, j], base[:, j])
            lost = (weight[:, j] - found[:, j]) / inverses[j][j, j]
            weight[:, j + 1 :] += sign * np.outer(lost, inverses[j][j, j + 1 :])
    return found


@pytest.mark.parametrize("keep", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("block", [7, 20, 128])
@pytest.mark.parametrize("released", [False, True])
def test_it_is_elimination(keep, block, released):
    before, after, x = layer()
    found = tailor(before, after, moment(x), keep, block=block, released=released)
    expected = by_elimination(before, after, moment(x), keep, block, 1 if released else -1)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-4)


def test_columns_to_the_right_of_a_block_are_written_once_for_all_of_its_own():
    class Written(TorchDispatchMode):
        entries = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.entries += args[0].numel() if function is torch.ops.aten.add_.Tensor else 0
            return function(*args, **(kwargs or {}))

    before, after, x = layer()
    with Written() as written:
        tailor(before, after, moment(x), block=5)
    inside, behind = 4 * (4 + 3 + 2 + 1), 15 + 10 + 5
    assert written.entries == OUT * (inside + behind) + IN  # and the moment's diagonal, which is damped


@pytest.mark.parametrize("seed", range(3))
def test_the_kept_weights_make_up_for_the_others_and_with_the_released_sign_do_not(seed):
    before, after, x = layer(seed)

    def error(weight):
        return float((x @ (weight - after).T).norm())

    found = tailor(before, after, moment(x), 0.4)
    kept = found != before
    assert int(kept.sum()) == int(0.4 * OUT * IN)
    assert error(found) < error(after.where(kept, before)) < error(tailor(before, after, moment(x), 0.4, released=True))


def test_keeping_all_changes_nothing_and_what_is_scaled_is_the_same():
    before, after, x = layer()
    torch.testing.assert_close(tailor(before, after, moment(x), 1.0), after)
    torch.testing.assert_close(tailor(before, after, moment(x), 0.2), tailor(before, after, 5 * moment(x), 0.2))


def test_inputs_that_are_never_there_and_layers_that_were_not_tuned():
    before, after, x = layer()
    x[:, 3] = 0
    assert torch.isfinite(tailor(before, after, moment(x), 0.2)).all()
    assert torch.equal(tailor(before, before, moment(x), 0.2), before)


def test_from_a_model_and_its_inputs_to_a_merged_model(tmp_path, pico_folder):
    base = pico_folder("llama")
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
    model = get_peft_model(pico.build("llama")[0], config).eval()
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path / "a")
    adapter = read(tmp_path / "a")
    names = [pair.name for pair in adapter.pairs]
    batches = [{"input_ids": torch.arange(5 * i, 5 * i + 9)[None]} for i in range(1, 4)]

    seen = []
    handle = model.get_submodule(f"base_model.model.{names[0]}").register_forward_hook(
        lambda module, inputs, output: seen.append(inputs[0][0])
    )
    moments = moments_of(model, names, batches)
    handle.remove()
    torch.testing.assert_close(moments[names[0]], moment(torch.cat(seen).detach()))
    weights = {name: model.get_submodule(f"base_model.model.{name}").base_layer.weight.detach() for name in names}
    update = model_tailor(adapter, weights, moments, 0.1)
    for name, delta in update.items():
        assert 0 < int((delta != 0).sum()) <= 0.1 * delta.numel()
        assert delta.shape == weights[name].shape
    assert write(update, tmp_path / "out", base=base).loss < 1e-5
    with pytest.raises(UserError, match="has no weight or no moment"):
        model_tailor(adapter, weights, {})
    with pytest.raises(UserError, match=r"has no layer model\.layers\.99"):
        moments_of(model, ["model.layers.99"], batches)
    with pytest.raises(UserError, match="saw no input"):
        moments_of(model, names, [])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda before, after, h: (before, after, h, 0), "not 0"),
        (lambda before, after, h: (before, after, h, 1.5), "not 1.5"),
        (lambda before, after, h: (before, after[1:], h), "do not belong to one layer"),
        (lambda before, after, h: (before, after, h[1:]), "do not belong to one layer"),
        (lambda before, after, h: (before, after, -h), "not that of real inputs"),
    ],
)
def test_mistakes(change, message):
    before, after, x = layer()
    with pytest.raises(UserError, match=message):
        tailor(*change(before, after, moment(x)))
