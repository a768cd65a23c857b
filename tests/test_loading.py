"""How and where the base of a run is loaded: its dtype, quantised, on the accelerator by all that computes."""

from __future__ import annotations

import importlib
import json
import logging
import shutil

import pico
import pytest
import torch
from commands import done, refused
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig
from trl import SFTConfig

from lorasculpt import UserError, dial, measure, play, train
from lorasculpt.adapters.load import load as load_adapter
from lorasculpt.models import load as loading
from lorasculpt.run import model
from lorasculpt.run.folder import ADAPTER

COMPUTE = ("run.model", "play", "inspect.update", "posthoc.calibrate")  # the first for all with a run
HERE = torch.device("cpu", 0)  # equal to no other device, and as good as the CPU


@pytest.fixture
def run(a_run):
    data = "data/train.jsonl"
    return a_run(
        method={"name": "lora", "r": 4, "lora_alpha": 8},
        training={"steps": 3, "batch": 2, "lr": 0.01, "precision": "fp32", "report_to": []},
        evaluate={"source": [data], "target": [data], "limit": 2, "max_new_tokens": 2},
    )


@pytest.fixture
def loaded(monkeypatch):
    """The devices on which bases were loaded, while the machine computes ``HERE``."""
    found: list[torch.device] = []
    for module in (importlib.import_module(f"lorasculpt.{name}") for name in COMPUTE):

        def spy(*arguments, real=module.load, **options):
            found.append(torch.device(options.get("device", "cpu")))
            return real(*arguments, **options)

        monkeypatch.setattr(module, "load", spy)
        monkeypatch.setattr(module, "computing", lambda: HERE)
    return found


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_a_base_with_code_of_its_own_is_run_where_that_is_asked_for_and_nowhere_else(run, tmp_path, pico_folder):
    own = tmp_path / "own"
    shutil.copytree(pico_folder("llama"), own)
    (own / "code.py").write_text(CODE)
    config = json.loads((own / "config.json").read_text())
    places = {"AutoConfig": "code.OwnConfig", "AutoModelForCausalLM": "code.OwnForCausalLM"}
    config |= {"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": places}
    (own / "config.json").write_text(json.dumps(config))
    rows = [{"question": f"{n} and {n}?", "answer": str(2 * n)} for n in range(4)]
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = (
        "method.target_modules=[q_proj]",
        f"base={own}",
        "data.train=text.jsonl",
        "evaluate.source=[text.jsonl]",
        "evaluate.target=[text.jsonl]",
    )
    file, trusted = tmp_path / "run.yaml", "trust_remote_code=true"
    run()
    assert "comes with code of its own, which is not run unless asked" in refused("train", file, *told)
    done("train", file, *told, trusted)
    done("eval", file, *told, trusted)
    adapter, out = tmp_path / "out" / ADAPTER, tmp_path / "merged"
    commands = [
        ("export", adapter, "--base", own, "--to", "merged", "--out", out),
        (
            "posthoc",
            "tailor",
            adapter,
            "--base",
            own,
            "--data",
            tmp_path / "text.jsonl",
            "--out",
            tmp_path / "tailored",
        ),
        ("posthoc", "dare", adapter, "--p", 0.5, "--base", own, "--out", tmp_path / "dare"),
    ]
    for command in commands:
        assert "code of its own" in refused(*command)
        done(*command, "--trust-remote-code")


def test_all_that_asks_a_model_asks_it_on_the_accelerator(run, tmp_path, loaded):
    config = run()
    data = tmp_path / "data" / "train.jsonl"
    done("train", tmp_path / "run.yaml")
    done("eval", tmp_path / "run.yaml")
    done("dial", tmp_path / "run.yaml")
    adapter = config.output / ADAPTER
    play.Panel(config.base, {"a": adapter})
    tailored = ("posthoc", "tailor", adapter, "--base", config.base, "--data", data, "--out", tmp_path / "tailored")
    done(*tailored)
    assert loaded == [HERE] * 5
    stages = f"data={{sequence: [{{name: a, train: {data}, test: {data}}}]}}"
    done("train", tmp_path / "run.yaml", stages, "evaluate.target=[]", "output=turns")
    assert loaded[5:] == [HERE] * 3  # trained, and before and after asked
    routed = ("method={name: loramoe, r: 4, lora_alpha: 8}", "output=routed", "evaluate={}")
    done("train", tmp_path / "run.yaml", *routed)
    done("inspect", tmp_path / "routed" / ADAPTER, "--base", config.base, "--data", data)
    assert loaded[8:] == [HERE] * 2


def test_of_several_gpus_one_process_takes_one(run, monkeypatch, capsys):
    # a CPU has none: it is said to have two for as long as nobody says otherwise
    monkeypatch.setattr(SFTConfig, "n_gpu", property(lambda self: self._n_gpu or 2))
    assert (train.train(run()) / "adapter_config.json").is_file()  # TRL refuses two
    told = "One of 2 GPUs trains; for all: accelerate launch -m lorasculpt train ..."
    assert capsys.readouterr().out.count(told) == 1


def test_of_several_processes_none_begins_on_its_accelerator(run, loaded, monkeypatch):
    def stop(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(train, "attach", stop)  # before any of them waits for the others
    with pytest.raises(KeyboardInterrupt):
        train.train(run(), progress=False)
    assert loaded == [torch.device("cpu")]


def test_several_processes_measure_nothing(run, loaded, monkeypatch):
    train.train(run(), progress=False)
    loaded.clear()
    monkeypatch.setenv("WORLD_SIZE", "2")
    for function, verb in ((measure.measure, "eval"), (dial.dial, "dial")):
        with pytest.raises(UserError, match=rf"by one process; start lorasculpt {verb} without a launcher\."):
            function(run(), progress=False)
    assert loaded == []


def test_a_quantised_base_goes_to_the_process_s_own_accelerator(run, monkeypatch):
    """bitsandbytes puts it on the current one, which is the first until a trainer is made."""
    current = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(model, "computing", lambda: torch.device("cuda"))
    monkeypatch.setattr(model, "load", lambda *_, **__: list(current))
    monkeypatch.setattr(torch.accelerator, "set_device_index", current.append)
    assert model.loaded(run()) == [1]  # its files may be quantised, and any other is placed by the trainer


def test_a_base_in_half_precision_has_an_adapter_in_full(run):
    config = run("dtype=bfloat16", "training.precision=bf16")
    folder = train.train(config, progress=False)
    assert {value.dtype for value in load_file(folder / "adapter_model.safetensors").values()} == {torch.float32}
    results = measure.measure(config, progress=False)
    (found,) = json.loads(results.read_text())["runs"]
    assert found["settings"]["dtype"] == "bfloat16"
    assert "quantization" not in found["settings"]  # what was left at its default is not among them
    kinds = {parameter.dtype for parameter in loading.load(config.base, **config.loading)[0].parameters()}
    assert kinds == {torch.bfloat16}
    assert "dtype is float32, but" in refused("eval", config.output.parent / "run.yaml")


@pytest.fixture
def bitsandbytes(monkeypatch):
    """As it is on a CPU with AVX512-BF16, where it packs 4-bit layers anew when they first answer."""
    found = pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(logging.getLogger(found.__name__), "disabled", True)
    monkeypatch.setattr(found.nn.modules, "has_avx512bf16", lambda: True)
    return found


@pytest.fixture
def wide(tmp_path, monkeypatch):
    """A tiny llava whose rows are whole 4-bit blocks, as those of most real models are."""
    for sizes in (pico.TEXT, pico.VISION):
        monkeypatch.setitem(sizes, "hidden_size", 64)
        monkeypatch.setitem(sizes, "intermediate_size", 128)
    return pico.save("llava", tmp_path / "wide")


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_a_quantised_base_is_trained_on_and_measured(run, wide, bits, bitsandbytes):
    config = run(f"base={wide}", f"quantization={bits}", "training.save_every=2")
    folder = train.train(config, progress=False)
    kept = load_file(folder / "adapter_model.safetensors")
    assert {value.dtype for value in kept.values()} == {torch.float32}  # and not TRL's bf16
    assert any(not torch.equal(value, value.bfloat16().float()) for value in kept.values())
    results = measure.measure(config, progress=False)
    (found,) = json.loads(results.read_text())["runs"]
    assert found["settings"]["quantization"] == bits
    model, _ = loading.load(config.base, **config.loading)
    assert any("bit" in type(module).__name__ for module in model.modules())
    load_adapter(model, folder)


def test_a_base_in_four_bits_that_has_answered_still_passes_gradients(wide, bitsandbytes):
    model, _ = loading.load(wide, quantization="4bit")
    tokens = torch.arange(4, 20)[None]
    with torch.no_grad():
        model.eval()(input_ids=tokens)
    inputs = model.get_input_embeddings()(tokens).detach().requires_grad_()
    model.train()(inputs_embeds=inputs, labels=tokens).loss.backward()
    layers = [module for module in model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    assert layers
    assert not any(getattr(layer.weight.quant_state, "packing_format_for_cpu", False) for layer in layers)
    assert inputs.grad[0, :-1].norm(dim=-1).min() > 0  # nothing follows the last


def test_four_bits_that_would_be_read_wrongly_are_refused(pico_folder, bitsandbytes, monkeypatch):
    """As they are on a CPU with AVX-512, where each row is read as if a block began with it."""
    read, base = bitsandbytes.functional.dequantize_4bit, pico_folder("llava")

    def otherwise(codes, state):
        return read(codes, state) * (1 if state.shape[0] == 1 else 2)

    monkeypatch.setattr(bitsandbytes.functional, "dequantize_4bit", otherwise)
    with pytest.raises(UserError, match=r"rows of \d+ weights, no multiple of 64, .*; use quantization: 8bit, or none"):
        loading.load(base, quantization="4bit")
    loading.load(base, quantization="8bit")


@pytest.fixture
def packed(tmp_path, wide, bitsandbytes):
    """Writes the tiny llava as a folder whose weights are quantised to so many bits."""

    def write(bits):
        how = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_quant_type="nf4")
        given, folder = wide, tmp_path / f"packed-{bits}"
        kinds = {"quantization_config": how, "device_map": "cpu"}
        AutoModelForImageTextToText.from_pretrained(given, **kinds).save_pretrained(folder)
        AutoProcessor.from_pretrained(given).save_pretrained(folder)
        return folder

    return write


def test_a_base_whose_files_are_quantised_is_loaded_where_models_compute(packed, monkeypatch):
    """GPTQ, AWQ and FP8 would stay on the CPU."""

    def placed(folder, *, device_map, **_):
        raise OSError(f"it goes to {device_map['']}")

    folder = packed(4)
    monkeypatch.setattr(loading, "computing", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 1)
    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", placed)
    with pytest.raises(UserError, match="it goes to cuda:1"):
        loading.load(folder)


@pytest.mark.parametrize("bits", [4, 8])
@torch.no_grad()
def test_a_base_whose_files_are_quantised_says_what_it_said(packed, wide, bits):
    folder, tokens = packed(bits), torch.arange(4, 20)[None]
    found, expected = (loading.load(base)[0](input_ids=tokens).logits for base in (folder, wide))
    assert float((found - expected).norm() / expected.norm()) < 0.1
    with pytest.raises(UserError, match=r"packed-\d is quantised already; leave quantization out"):
        loading.load(folder, quantization="4bit")


def test_a_base_whose_files_are_quantised_is_trained_on_and_not_merged_into(run, packed, tmp_path):
    base = packed(4)
    file, given, out = tmp_path / "run.yaml", f"base={base}", ("--out", tmp_path / "made")
    run()
    assert f"is full, but {base} is quantised" in refused("train", file, given, "projector=full", "output=whole")
    done("train", file, given, "training.steps=1")
    adapter = tmp_path / "out" / ADAPTER
    merged = [
        ("export", adapter, "--to", "merged", *out),
        ("posthoc", "dare", adapter, "--p", 0.5, *out),
        ("posthoc", "tailor", adapter, "--data", tmp_path / "data" / "train.jsonl", "--to", "lora", "--rank", 2, *out),
    ]
    for command in merged:
        assert f"{base} is quantised, and an update is not worked out on its weights" in refused(
            *command, "--base", base
        )
        assert not (tmp_path / "made").exists()
    done("export", adapter, "--base", base, *out)
