"""Tasks as a column of the data, under the trainers that people have, with the collators of these trainers."""

from __future__ import annotations

import pico
import pytest
from contract import QUIET
from datasets import Dataset
from peft import get_peft_model
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments, default_data_collator
from trl import SFTConfig, SFTTrainer

from lorasculpt import ClockCallback, MTLLoRAConfig, TaskCollator, UserError
from lorasculpt.adapters.context import TASK_IDS
from lorasculpt.adapters.update import context_of

TASKS = ["color", "shape"]
CONFIG = MTLLoRAConfig(r=4, target_modules=["q_proj", "v_proj"], tasks=TASKS)
ASKED = {"color": "What color is it?", "shape": "Is it a square or a circle?"}


def talk(pictures: bool = False) -> Dataset:
    """Eight questions and answers of two tasks, in turn."""
    rows = []
    for number in range(8):
        task = TASKS[number % 2]
        asked = [{"type": "image"}, {"type": "text", "text": ASKED[task]}] if pictures else ASKED[task]
        said = [{"type": "text", "text": "red"}] if pictures else "red"
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
        rows.append({"messages": messages, "task": task} | ({"images": [pico.picture(number)]} if pictures else {}))
    return Dataset.from_list(rows)


def tokens(tokenizer) -> Dataset:
    """The questions of :func:`talk`, as a plain trainer takes them."""
    rows = [{"input_ids": tokenizer(ASKED[TASKS[i % 2]])["input_ids"], "task": TASKS[i % 2]} for i in range(8)]
    return Dataset.from_list([row | {"labels": row["input_ids"]} for row in rows])


def taught(trainer, tokenizer) -> int:
    """Train, and see that every row that the model gets has the task of its words; how many rows there were."""
    trainer.data_collator = TaskCollator(trainer.data_collator, TASKS)
    context, seen = context_of(trainer.model), []
    trainer.model.get_base_model().register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((context.tasks.tolist(), kwargs["input_ids"])), with_kwargs=True
    )
    trainer.train()
    for ids, batch in seen:
        assert [TASKS["square" in text] for text in tokenizer.batch_decode(batch)] == [TASKS[number] for number in ids]
    return sum(len(ids) for ids, _ in seen)


@pytest.fixture
def sft(tmp_path):
    """A function that gives TRL's trainer, with the collator that it makes itself."""

    def made(family: str, data: Dataset, **settings) -> SFTTrainer:
        model, processor = pico.build(family)
        arguments = {**QUIET, "bf16": False, "max_steps": 2, "remove_unused_columns": False, "max_length": None}
        return SFTTrainer(
            model,
            SFTConfig(str(tmp_path), **{**arguments, **settings}),
            train_dataset=data,
            processing_class=processor,
            peft_config=CONFIG,
            callbacks=[ClockCallback()],
        )

    return made


def test_trls_trainer_takes_tasks_along(sft):
    trainer = sft("llama", talk())
    assert taught(trainer, trainer.processing_class) > 0
    trainer.eval_dataset = trainer.train_dataset
    assert trainer.evaluate()["eval_loss"] > 0


def test_trls_trainer_takes_tasks_along_with_pictures(sft):
    trainer = sft("llava", talk(pictures=True))
    assert taught(trainer, trainer.processing_class.tokenizer) > 0


@pytest.mark.parametrize("padded", [True, False])
def test_the_plain_trainer_takes_tasks_along(tmp_path, padded):
    base, tokenizer = pico.build("llama")
    model = get_peft_model(base, CONFIG)
    collator = DataCollatorForSeq2Seq(tokenizer) if padded else default_data_collator
    arguments = {**QUIET, "max_steps": 2, "remove_unused_columns": False}
    if not padded:
        arguments["per_device_train_batch_size"] = 1
    trainer = Trainer(
        model,
        TrainingArguments(str(tmp_path), **arguments),
        train_dataset=tokens(tokenizer),
        data_collator=collator,
        callbacks=[ClockCallback()],
    )
    assert taught(trainer, tokenizer) > 0


@pytest.mark.parametrize(
    "settings", [{"remove_unused_columns": True}, {"packing": True, "packing_strategy": "wrapped"}]
)
def test_a_column_that_the_trainer_drops_is_told(sft, settings):
    trainer = sft("llama", talk(), max_length=32, **settings)
    with pytest.raises(
        UserError, match=r"a row has no column 'task', only .*input_ids.*: .* remove_unused_columns=False"
    ):
        taught(trainer, trainer.processing_class)


def test_without_the_collator_the_error_names_it(sft):
    with pytest.raises(UserError, match=r"in a trainer use lorasculpt\.TaskCollator; it knows color, shape"):
        sft("llama", talk()).train()


def test_a_task_that_is_not_known_is_told():
    collate = TaskCollator(lambda rows: {"rows": rows}, TASKS)
    assert collate([{"a": 1, "task": "shape"}, {"a": 2, "task": "color"}])[TASK_IDS].tolist() == [1, 0]
    assert collate([{"a": 1, "task": "shape"}])["rows"] == [{"a": 1}]
    for strange in ("side", 0, None):
        with pytest.raises(UserError, match=f"a row has the unknown task {strange!r}; the adapter knows color, shape"):
            collate([{"task": strange}])
