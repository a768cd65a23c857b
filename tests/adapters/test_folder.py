"""Where an adapter lies: folders here, and names on the Hub, which is a cache on this disk."""

from __future__ import annotations

import pico
import pytest
import torch
from contract import start, texts, train
from huggingface_hub import constants
from peft import PeftConfig, PeftModel

from lorasculpt import METHODS, LoRAMoEConfig, UserError, load
from lorasculpt.adapters.folder import folder_of
from lorasculpt.adapters.method import methods_of
from lorasculpt.adapters.update import updates

COMMITS = {"main": "a" * 40, "v2": "b" * 40}


@pytest.fixture
def cached(tmp_path):
    """A function that puts the adapter of a model into a cache of the Hub as ``me/moe``, and gives the cache."""

    def put(model, revision: str = "main", subfolder: str = ""):
        repo = tmp_path / "cache" / "models--me--moe"
        (repo / "refs").mkdir(parents=True, exist_ok=True)
        (repo / "refs" / revision).write_text(COMMITS[revision])
        model.save_pretrained(repo / "snapshots" / COMMITS[revision] / subfolder)
        return tmp_path / "cache"

    return put


def moe(seed: int):
    torch.manual_seed(seed)
    model, _ = start("llama", "loramoe")
    for update in updates(model).values():
        torch.nn.init.normal_(update.B)
    return model.eval()


@pytest.mark.parametrize("revision", [None, "v2"])
def test_an_adapter_of_a_type_of_its_own_is_loaded_by_its_name(cached, revision):
    models = {None: moe(1), "v2": moe(2)}
    for name, model in models.items():
        cache = cached(model, name or "main")
    options = {"revision": revision, "cache_dir": cache}
    again = PeftModel.from_pretrained(pico.build("llama")[0], "me/moe", torch_device="cpu", **options).eval()
    batch = texts()[0]
    assert torch.equal(again(**batch).logits, models[revision](**batch).logits)


def test_its_config_may_lie_in_a_subfolder(cached):
    model = moe(1)
    config = PeftConfig.from_pretrained("me/moe", subfolder="last/best", cache_dir=cached(model, subfolder="last/best"))
    assert type(config) is LoRAMoEConfig
    assert config.num_experts == model.peft_config["default"].num_experts


def test_without_options_the_cache_is_the_hubs_own(cached, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cached(moe(1))))
    assert LoRAMoEConfig.from_pretrained("me/moe").method == "loramoe"


def test_a_name_that_the_hub_does_not_give_is_told(tmp_path):
    with pytest.raises(UserError, match=r"me/gone is no folder here, and the Hub does not give it \(.*\): correct the"):
        LoRAMoEConfig.from_pretrained("me/gone", cache_dir=tmp_path)


def test_a_folder_goes_before_a_name_and_a_path_is_no_name(tmp_path, monkeypatch):
    (tmp_path / "me" / "moe").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert folder_of("me/moe", ()).samefile(tmp_path / "me" / "moe")
    assert folder_of(tmp_path / "gone", (), "inside") == tmp_path / "gone" / "inside"
    with pytest.raises(ValueError, match="holds no loramoe adapter"):
        LoRAMoEConfig.from_pretrained("me/moe")


@pytest.mark.parametrize("method", ["loramoe", "lorasculpt"])
@pytest.mark.parametrize("subfolder", [None, "last/best"])
def test_a_name_on_the_hub_loads_with_its_method(tmp_path, method, subfolder):
    model, _ = start("llama", method)
    train(model, [texts()] * 3)
    repo = tmp_path / "cache" / "models--me--moe"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("a" * 40)
    model.save_pretrained(repo / "snapshots" / ("a" * 40) / (subfolder or ""))
    for trainable in (False, True):
        again = load(pico.build("llama")[0], "me/moe", trainable, subfolder=subfolder, cache_dir=tmp_path / "cache")
        assert torch.equal(again.eval()(**texts()[0]).logits, model.eval()(**texts()[0]).logits)
    assert methods_of(again)["default"].step == 3
    assert METHODS[method].from_pretrained("me/moe", subfolder=subfolder, cache_dir=tmp_path / "cache").method == method
