"""A page on this machine where a base and its adapters answer the same question about the same picture.

The page is Gradio's (``pip install 'lorasculpt[play]'``). It is served to this machine alone and sends nothing
anywhere; pictures given to it are forgotten when it is closed.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import random
import signal
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftConfig
from safetensors import safe_open
from torch import nn

from .adapters.load import PROJECTOR_FILE
from .adapters.load import load as load_adapter
from .adapters.origin import sees
from .adapters.residual import moved_by
from .adapters.update import known_tasks
from .config import RunConfig
from .data.records import Record
from .errors import UserError
from .evaluation import answer, strength
from .evaluation.prompts import tokenizer_of
from .evaluation.strength import fixed
from .models.load import autocast_dtype, computing, load, see_as
from .run.folder import ADAPTER, check_trained
from .run.records import held_out

EXAMPLES = 12
LARGEST = "50mb"  # of a picture that is given to the page


@dataclass(frozen=True)
class Answerer:
    """One model on the page.

    Args:
        name: as the page shows it.
        model: the base, or the base with an adapter.
        tasks: those that its adapter knows; a question has to be asked as one of them.
        adjustable: whether its adapter can be turned down.
    """

    name: str
    model: nn.Module
    tasks: tuple[str, ...] = ()
    adjustable: bool = False


class Panel:
    """A base and adapters of it, ready to be asked. The weights of the base are in memory once.

    Args:
        base: folder or Hub name of the base model.
        adapters: the folder of each adapter, by the name that it is to have.
        loading: how the base is loaded, as in `lorasculpt.models.load.load`.

    Raises:
        UserError: there is no such base, or an adapter is none or does not fit it, or they see pictures differently.
    """

    def __init__(self, base: str, adapters: Mapping[str, Path], **loading: Any) -> None:
        for folder in adapters.values():  # before the base is loaded, which may take long
            if not (folder / "adapter_config.json").is_file():
                raise UserError(f"{folder} holds no adapter; train the run first, or name the adapter's folder.")
        if len({sees(folder) for folder in adapters.values()}) > 1:
            raise UserError(
                f"{' and '.join(adapters)} were trained with other settings of image_processor; show them one by one."
            )
        model, self._processor = load(base, **loading, device=computing())
        for folder in list(adapters.values())[:1]:  # which stands for all
            see_as(self._processor, folder)
        self._precision = autocast_dtype(model.device)
        self.sees = self._processor is not tokenizer_of(self._processor)
        """Whether the base reads pictures."""
        self.answerers = [Answerer("base", model)]
        """The base, then the adapters in their order."""
        for name, folder in adapters.items():
            tuned = load_adapter(_twin(model, folder), folder)
            adjustable = fixed(tuned) is None and not (folder / PROJECTOR_FILE).is_file()
            self.answerers.append(Answerer(name, tuned, tuple(known_tasks(tuned) or ()), adjustable))

    def answer(
        self,
        answerer: Answerer,
        question: str,
        picture: str | Path | None = None,
        *,
        by: float = 1.0,
        task: str | None = None,
        max_new_tokens: int = 64,
    ) -> str:
        """What one of the ``answerers`` says.

        Args:
            answerer: which.
            question: not empty.
            picture: a file, where the base reads pictures.
            by: strength of the adapter, from 0 (the base) to 1, where it is adjustable.
            task: as which of its tasks an adapter that knows tasks takes the question.
            max_new_tokens: length at which the answer is cut.

        Raises:
            UserError: the question is empty, the picture is none or too large, or a task is missing or unknown.
        """
        if not question.strip():
            raise UserError("there is nothing to answer; write a question.")
        images = (Path(picture),) if picture else ()
        record = Record(({"role": "user", "content": question.strip()},), answer="-", images=images)
        options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "precision": self._precision, "as_task": task}
        with strength(answerer.model, by) if answerer.adjustable and by != 1 else nullcontext():
            return answer(answerer.model, self._processor, [record], **options)[0]


def _twin(base: nn.Module, folder: Path) -> nn.Module:
    """The modules of ``base`` once more, around the same weights, for the adapter in ``folder``.

    Adapters of any kinds can so stand beside each other. Weights that loading the adapter will change are copied.
    """
    weights = dict(base.named_parameters())
    if moved_by(PeftConfig.from_pretrained(str(folder))) is not None:
        weights = {}
    if (folder / PROJECTOR_FILE).is_file():
        with safe_open(folder / PROJECTOR_FILE, "pt") as file:
            weights = {name: weight for name, weight in weights.items() if name not in file.keys()}  # noqa: SIM118
    return copy.deepcopy(base, {id(weight): weight for weight in weights.values()})


def examples(config: RunConfig, n: int = EXAMPLES) -> list[Record]:
    """Up to ``n`` questions of a run's ``evaluate`` files, half of them of its target, drawn by chance.

    Those with several pictures or several turns are left out: the page has room for one.
    """
    rng, drawn = random.Random(0), []
    for group in reversed(held_out(config)):
        records = [record for task in group for record in task.records]
        records = [record for record in records if len(record.images) <= 1 and len(record.prompt) == 1]
        drawn += rng.sample(records, min(n // 2, len(records)))
    return drawn


def page(panel: Panel, shown: Sequence[Record] = (), max_new_tokens: int = 64):
    """The page as a ``gradio.Blocks``: a picture, a question, and an answer of each of the panel's models."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read on import
    import gradio as gr

    def ask(picture: str | None, question: str, *settings: Any) -> Iterator[list[str]]:
        said = [""] * len(panel.answerers)
        for i, answerer in enumerate(panel.answerers):
            by, task = settings[2 * i : 2 * i + 2]
            try:
                said[i] = panel.answer(
                    answerer, question or "", picture, by=by, task=task, max_new_tokens=max_new_tokens
                )
            except UserError as error:
                raise gr.Error(str(error), print_exception=False) from error
            yield list(said)

    with gr.Blocks(title="lorasculpt play", analytics_enabled=False) as blocks:
        with gr.Row():
            # handed on as it came, for the library to open
            picture = gr.Image(label="Picture", type="filepath", image_mode=None, height=300, visible=panel.sees)
            with gr.Column():
                question = gr.Textbox(label="Question", lines=2)
                right = gr.Textbox(label="Right answer", visible=False)
                button = gr.Button("Ask", variant="primary")
        answers, settings = [], []
        with gr.Row():
            for answerer in panel.answerers:
                with gr.Column(min_width=240):
                    answers.append(gr.Textbox(label=answerer.name, lines=3, interactive=False))
                    settings.append(gr.Slider(0, 1, 1, step=0.05, label="Strength", visible=answerer.adjustable))
                    tasks = list(answerer.tasks)
                    settings.append(
                        gr.Dropdown(tasks, value=next(iter(tasks), None), label="Task", visible=bool(tasks))
                    )
        if shown:
            columns = [question, right, *([picture] if panel.sees else [])]
            rows = [[record.question, record.answer, str((*record.images, "")[0]) or None] for record in shown]
            rows = [row[: len(columns)] for row in rows]
            gr.Examples(rows, columns, examples_per_page=EXAMPLES)
        gr.on([button.click, question.submit], ask, [picture, question, *settings], answers, api_name="ask")
    return blocks


def play(
    paths: Sequence[str | Path],
    base: str | None = None,
    *,
    port: int | None = None,
    browse: bool = True,
    max_new_tokens: int = 64,
) -> None:
    """Serve the page at 127.0.0.1 until it is interrupted.

    Args:
        paths: run files (YAML) and folders of adapters, all of one base.
        base: the base, where no run file names it.
        port: of the page. Default: the first free one from 7860.
        browse: whether to open it in the browser.
        max_new_tokens: length at which an answer is cut.

    Raises:
        UserError: Gradio is missing, bases differ or none is named, an adapter cannot be loaded, or the port is taken.
    """
    if importlib.util.find_spec("gradio") is None:
        raise UserError("the page needs the package gradio; install it with: pip install 'lorasculpt[play]'.")
    base, loading, adapters, shown = _told([Path(path) for path in paths], base)
    panel = Panel(base, adapters, **loading)
    with tempfile.TemporaryDirectory(prefix="lorasculpt-play-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # where it puts the pictures that it is given
        blocks = page(panel, shown, max_new_tokens)
        try:
            _, address, _ = blocks.launch(
                server_name="127.0.0.1",
                server_port=port,
                share=False,
                mcp_server=False,
                ssr_mode=False,
                inbrowser=browse,
                show_error=True,
                max_file_size=LARGEST,
                footer_links=[],
                quiet=True,
                prevent_thread_lock=True,
            )
        except OSError as error:
            raise UserError(f"the page has no port ({error}); name a free one with --port.") from error
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.default_int_handler)  # who is ended forgets the pictures too
        print(f"page: {address} (Ctrl-C closes it)", flush=True)
        blocks.block_thread()


def _told(paths: Sequence[Path], base: str | None) -> tuple[str, dict[str, Any], dict[str, Path], list[Record]]:
    """The base, how it is loaded, the adapters by name, and the examples of the first run."""
    runs = {path: RunConfig.load(path) for path in paths if not path.is_dir()}
    for path, config in runs.items():
        check_trained(config)
        base = base or config.base
        if config.base != base:
            raise UserError(
                f"{path} is a run of {config.base}, not of {base}; adapters of one base can be shown together."
            )
    if base is None:
        raise UserError(f"{paths[0]} does not tell its base; name it with --base.")
    folders = [runs[path].output / ADAPTER if path in runs else path for path in paths]
    names = [(folder.parent if folder.name == ADAPTER else folder).resolve().name for folder in folders]
    names = [name if names.count(name) == 1 else str(path) for name, path in zip(names, paths, strict=True)]
    first = next(iter(runs.values()), None)
    loading, shown = (first.loading, examples(first)) if first else ({}, [])
    return base, loading, dict(zip(names, folders, strict=True)), shown
