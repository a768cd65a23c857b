"""Arguments of TRL's trainer in a run file, and a finished adapter on the Hub; nothing here goes there."""

from __future__ import annotations

import dataclasses
import json
import os

import pytest
import torch
from huggingface_hub import HfApi
from transformers import Trainer
from trl import SFTConfig, SFTTrainer

from lorasculpt import UserError, train
from lorasculpt.config import RunConfig
from lorasculpt.measure import measure
from lorasculpt.run import trainer
from lorasculpt.run.folder import write_record

PUSH = ("training.arguments.push_to_hub=true", "training.arguments.hub_model_id=me/tiny")


@pytest.fixture
def run(a_run):
    """Write a run of the tiny llava and return a function that gives its config, changed by ``key=value``."""
    return a_run(
        method={"name": "lora", "r": 2, "target_modules": ["q_proj"]},
        training={"steps": 1, "batch": 2, "precision": "fp32", "report_to": []},
        evaluate={
            "source": ["data/train.jsonl"],
            "target": ["data/train.jsonl"],
            "limit": 1,
            "max_new_tokens": 2,
            "strengths": [],
        },
    )


@pytest.fixture
def hub(monkeypatch):
    """What would go to the Hub: the calls, and the files of what is uploaded."""
    calls: list[tuple] = []

    class Made:
        repo_id = "me/tiny"

    def create_repo(self, repo_id, **settings):
        calls.append(("create_repo", repo_id, settings))
        return Made

    def create_branch(self, repo_id, **settings):
        calls.append(("create_branch", repo_id, settings))

    def upload_folder(self, *, folder_path, **settings):
        files = {path.name for path in folder_path.iterdir()}
        calls.append(("upload_folder", folder_path, settings | {"files": files}))

    for function in (create_repo, create_branch, upload_folder):
        monkeypatch.setattr(HfApi, function.__name__, function)
    # a trainer with push_to_hub makes a repository of its own
    monkeypatch.setattr(Trainer, "init_hf_repo", lambda self, token=None: pytest.fail("the trainer pushes"))
    return calls


def test_whatever_is_set_here_is_not_taken_from_the_file(run, monkeypatch):
    monkeypatch.setattr(trainer, "SFTConfig", dict)
    known = {*trainer.OWN_ARGUMENTS, *trainer.FIXED, *trainer.DEFAULTS}
    for override in ("training.steps=1", "training.steps=null"):
        assert trainer.arguments(run(override), False, None).keys() <= known


TAKEN = """
    accelerator_config activation_offloading adam_beta1 adam_beta2 adam_epsilon auto_find_batch_size
    average_tokens_across_devices data_seed dataloader_drop_last dataloader_in_order dataloader_multiprocessing_context
    dataloader_persistent_workers dataloader_prefetch_factor ddp_backend ddp_broadcast_buffers ddp_bucket_cap_mb
    ddp_find_unused_parameters ddp_static_graph ddp_timeout debug fsdp fsdp_config full_determinism
    gradient_checkpointing_kwargs ignore_data_skip include_num_input_tokens_seen label_smoothing_factor
    liger_kernel_config log_level log_level_replica log_on_each_node logging_first_step logging_nan_inf_filter
    logging_strategy loss_type lr_scheduler_kwargs neftune_noise_alpha project router_aux_loss_coef run_name
    skip_memory_metrics tf32 torch_compile torch_compile_backend torch_compile_mode torch_empty_cache_steps
    trackio_bucket_id trackio_space_id trackio_static_space_id train_sampling_strategy use_liger_kernel
"""


def test_of_every_argument_of_trl_it_is_known_what_comes_of_it():
    """A new one of another version is looked up: what it does where rows, batches and the base are made here."""
    lists = (trainer.OWN_ARGUMENTS, trainer.FIXED, trainer.IDLE, trainer.PUSHING, TAKEN.split())
    found = sorted(name for names in lists for name in names)
    assert found == sorted(field.name for field in dataclasses.fields(SFTConfig) if field.init)


MISTAKES = {
    "dataloader_drop_lats: true": "is no argument of TRL's SFTConfig; did you mean dataloader_drop_last?",
    "qqq: 1": "is no argument of TRL's SFTConfig; see its documentation.",
    "learning_rate: 1": "is not taken here; use training.lr.",
    "hub_token: hf_x": "is not taken here; use hf auth login: a token is not for a file.",
    "optim: sgd": "is set by lorasculpt itself; remove it.",
    "neftune_noise_alpha: five": "must be a number or null; got 'five'.",
    "completion_only_loss: false": "is not taken here: what is learned is the answer of a row, always; remove it.",
    "train_sampling_strategy: group_by_length": "must be random or sequential, because rows have no length before",
    "lr_scheduler_kwargs: {foo: 1}": "must be {num_cycles: NUMBER}, which is all that a cosine takes; got {'foo': 1}.",
    "lr_scheduler_kwargs: {num_cycles: many}": "must be {num_cycles: NUMBER}, which is all that a cosine takes; got",
    "use_liger_kernel: true": "needs liger-kernel, which is not installed; install it, or remove this.",
    "activation_offloading: true": "needs an accelerator; remove it.",
    "push_to_hub: true": "needs a hub_model_id, such as name/invoices; add it.",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_an_argument_that_is_not_taken_is_told_with_its_line_and_leaves_nothing(line, run, tmp_path, hub):
    path = tmp_path / "run.yaml"
    path.write_text(path.read_text().replace("training:\n", f"training:\n  arguments:\n    {line}\n"))
    number = path.read_text().splitlines().index(f"    {line}") + 1
    with pytest.raises(UserError) as error:
        train.train(run(), progress=False)
    told = f"{path}:{number}: training.arguments.{line.split(':')[0]} {MISTAKES[line]}"
    assert str(error.value).startswith(told)
    assert not (tmp_path / "out").exists()
    assert hub == []


def test_a_schedule_takes_what_shapes_it_and_no_other_does(run):
    trainer.check_arguments(run("training.arguments={lr_scheduler_kwargs: {num_cycles: 2}}"))
    with pytest.raises(UserError, match="lr_scheduler_kwargs is nothing that a linear schedule takes; remove it"):
        trainer.check_arguments(
            run("training.arguments={lr_scheduler_kwargs: {num_cycles: 2}}", "training.schedule=linear")
        )


def test_what_the_trainer_refuses_is_told(run, monkeypatch):
    config = run("training.arguments={logging_strategy: often}")
    with pytest.raises(UserError, match=r"override .*often.*: training.arguments is refused: often is not a valid"):
        trainer.arguments(config, False, None)

    def broken(**settings):
        raise ValueError("no precision is right here")

    monkeypatch.setattr(trainer, "SFTConfig", broken)
    with pytest.raises(ValueError, match="no precision") as error:  # whatever was given
        trainer.arguments(config, False, None)
    assert not isinstance(error.value, UserError)


def test_what_the_trainer_refuses_later_is_told_and_leaves_nothing(run):
    config = run("training.arguments={router_aux_loss_coef: 0.1}")
    with pytest.raises(UserError, match=r"training.arguments is refused: `router_aux_loss_coef` is set to 0.1 but"):
        train.train(config, progress=False)
    assert not config.output.exists()


@pytest.mark.parametrize(("processors", "processes", "workers"), [(16, 1, 4), (8, 4, 1), (3, 1, 2), (1, 1, 0)])
def test_processors_that_an_accelerator_leaves_idle_prepare_its_batches(
    run, monkeypatch, processors, processes, workers
):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(processors)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    monkeypatch.setattr(trainer, "SFTConfig", dict)

    def asked(*overrides):
        return trainer.arguments(run(*overrides), False, None)["dataloader_num_workers"]

    assert asked() == 0
    monkeypatch.setattr(trainer, "computing", lambda: torch.device("cuda"))
    monkeypatch.setattr(trainer, "free", lambda folder: 2**26)  # a container's shared memory
    assert asked() == 0
    monkeypatch.setattr(trainer, "free", lambda folder: 2**34)
    assert asked() == workers
    assert asked("training.workers=7") == 7
    assert asked("training.workers=0") == 0


def test_masks_are_not_sent_from_process_to_process_unless_asked_for(run):
    assert trainer.arguments(run(), False, None).ddp_broadcast_buffers is False
    asked = run("training.arguments={ddp_broadcast_buffers: true}")
    assert trainer.arguments(asked, False, None).ddp_broadcast_buffers is True


def test_arguments_reach_the_trainer_and_the_finished_adapter_the_hub(run, hub, monkeypatch):
    seen, init = [], SFTTrainer.__init__
    monkeypatch.setattr(SFTTrainer, "__init__", lambda self, **given: seen.append(given["args"]) or init(self, **given))
    further = "training.arguments={run_name: first, adam_beta2: 0.9, average_tokens_across_devices: false}"
    config = run(further, *PUSH, "training.save_every=1", "training.arguments.hub_private_repo=true")
    adapter = train.train(config, progress=False)
    (found,) = seen
    assert (found.run_name, found.adam_beta2, found.average_tokens_across_devices) == ("first", 0.9, False)
    assert not found.push_to_hub
    (_, name, made), (_, folder, settings) = hub  # no checkpoint
    assert (name, made) == ("me/tiny", {"private": True, "exist_ok": True})
    assert folder == adapter == config.output / "adapter"
    assert {"adapter_config.json", "adapter_model.safetensors"} <= settings["files"]
    assert settings["repo_id"] == "me/tiny"

    shaped = json.loads(measure(config, progress=False).read_text())["runs"][0]["settings"]
    # seeds with names and places of their own are one entry of a report
    assert shaped["training"]["arguments"] == {"adam_beta2": 0.9, "average_tokens_across_devices": False}


@pytest.fixture
def finished(run):
    """As ``run``, of a run that is done."""

    def made(*overrides: str) -> RunConfig:
        config = run(*overrides)
        (config.output / "adapter").mkdir(parents=True)
        write_record(config)
        (config.output / "adapter" / "adapter_config.json").write_text("{}")
        return config

    return made


def test_a_revision_is_a_branch(finished, hub):
    train.train(finished(*PUSH, "training.arguments.hub_revision=v2"))
    assert [call[0] for call in hub] == ["create_repo", "create_branch", "upload_folder"]
    assert hub[1][2] == {"branch": "v2", "exist_ok": True}
    assert hub[2][2]["revision"] == "v2"


def test_without_being_asked_nothing_is_pushed(finished, hub):
    train.train(finished("training.arguments.hub_model_id=me/tiny"))
    assert hub == []


def test_of_several_processes_the_first_pushes(finished, hub, monkeypatch):
    config = finished(*PUSH)
    for rank, calls in (("1", 0), ("0", 2)):
        monkeypatch.setenv("RANK", rank)
        train.train(config)
        assert len(hub) == calls


def test_a_push_that_did_not_work_is_told_and_done_by_the_next_call(finished, hub, monkeypatch):
    def fail(self, **settings):
        raise OSError("no way.\nmore")

    config = finished(*PUSH)
    with monkeypatch.context() as patch:
        patch.setattr(HfApi, "upload_folder", fail)
        with pytest.raises(
            UserError, match=r"push_to_hub did not work \(no way\); the adapter is whole in .*adapter: "
        ):
            train.train(config)
    train.train(config)
    assert hub[-1][0] == "upload_folder"


def test_a_comparison_pushes_nothing(run):
    with pytest.raises(UserError, match="push_to_hub is of one run, not of a comparison; remove it"):
        run(*PUSH).single("lora", {"name": "lora"})
