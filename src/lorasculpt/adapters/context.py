"""What the layers of a model may know about the forward pass they are in: tasks, padding, prompt, prefill or decode.

One :class:`Context` belongs to one model. A hook on the base model's forward fills it and takes out what the base model
would not understand, so ``model(**batch, task=["a", "b"])`` and ``model.generate(..., task="a")`` work whatever wraps
the model. Under gradient checkpointing a layer that is computed again sees the context of the *last* forward pass:
run the backward pass of one batch before the forward pass of the next, as every trainer does.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias, TypeGuard

import torch
from torch import Tensor, nn

from ..errors import UserError

TASK_IDS = "routing_task_ids"  # not task_ids: PEFT's own wrappers swallow that

Tasks: TypeAlias = str | Sequence[str] | Tensor


class Context:
    """The forward pass that is under way.

    Attributes:
        tasks: the task of each sample as given: names, or ids (batch,); one name stands for the whole batch.
        batch: how many rows the language model gets: samples, times beams or returned sequences.
        length: how many tokens each of them has in this pass.
        padding: (batch, keys) True where a token is real, over all the keys that attention sees; None: all are real.
        prompt: (batch, length) True where a token belongs to the prompt, where labels or :meth:`answered` tell; None:
            nothing does.
        decoding: whether keys of earlier tokens come from a cache.
        continues: whether this pass goes on with a generation whose prompts have been seen, with a cache or without.
        weight: what a loss of one micro-batch counts, a scalar tensor that the clock sets.
        recorder: where layers note what they route, if someone wants to see it (``lorasculpt inspect``).
    """

    def __init__(self) -> None:
        self.tasks: Tasks | None = None
        self.batch: int | None = None
        self.length: int | None = None
        self.padding: Tensor | None = None
        self.prompt: Tensor | None = None
        self.decoding = False
        self.continues = False
        self.weight = torch.ones(())
        self.recorder: Callable[[str, Tensor, Tensor | None], None] | None = None
        self._span: tuple[int, int] | None = None  # the smallest and the largest of the ids, where tasks are ids
        self._pictured: bool | None = None  # whether every sample has a picture; None: nobody has asked
        self._words: Tensor | None = None  # (batch, length) the ids of this pass's tokens, where it is given any
        self._image: int | None = None  # the id that stands for pictures
        self._held: Tasks | None = None  # the tasks of a whole generation
        self._answer: Tensor | None = None  # (batch, width) which of the last tokens are of the answer
        self._passes: int | None = None  # of the generation under way, so far
        self._undo: list[Callable[[], None]] = []

    # --- the front door ---------------------------------------------------------------------------------------------

    def attach(self, model: nn.Module) -> None:
        """Listen to the forward passes and generations of ``model``."""
        self._undo.append(model.register_forward_pre_hook(self._enter, with_kwargs=True).remove)
        if hasattr(model, "generate"):
            model.generate = functools.partial(self._generate, model)
            self._undo.append(functools.partial(model.__dict__.pop, "generate", None))

    def detach(self) -> None:
        """Leave the model as it was."""
        while self._undo:
            self._undo.pop()()

    @contextmanager
    def answered(self, answer: Tensor) -> Iterator[None]:
        """Within the block ``answer`` (batch, width) says which of the last tokens are of the answer, as labels do."""
        self._answer = answer
        try:
            yield
        finally:
            self._answer = None

    def _enter(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]):
        given, ids = kwargs.pop("task", None), kwargs.pop(TASK_IDS, None)
        given = ids if given is None else given
        named = dict(zip(inspect.signature(model.forward).parameters, args, strict=False)) | kwargs if args else kwargs
        words = (named[key] for key in ("input_ids", "inputs_embeds") if named.get(key) is not None)
        self._begin(model, self._held if given is None else given, next(words, args[0] if args else None))
        labels = named.get("labels")
        if isinstance(labels, Tensor):
            self.prompt = labels == -100
        elif self._answer is not None and self.length is not None:
            self.prompt = nn.functional.pad(~self._answer, (self.length - self._answer.shape[1], 0), value=True)
        cache = named.get("past_key_values")
        seen = 0 if cache is None else cache.get_seq_length()
        self.padding = self._real_keys(named.get("attention_mask"), seen)
        self.decoding = seen > 0
        self.continues = self.decoding or bool(self._passes)
        if self._passes is not None:
            self._passes += 1
        return args, kwargs

    def _real_keys(self, mask: Any, seen: int) -> Tensor | None:
        """(batch, keys) True where a token is real, by a mask of any form that models take; None: it does not tell."""
        mask = mask.get("full_attention") if isinstance(mask, Mapping) else mask  # one for each kind of layer
        if not isinstance(mask, Tensor):
            return None
        if mask.dim() == 4 and self.length is not None:
            # (batch, 1, queries, keys), added or boolean, with room for keys to come where the cache is static: what is
            # real sees itself, be it in a window or packed with others
            itself = mask[:, 0].diagonal(seen, -2, -1)
            sees = itself > torch.finfo(mask.dtype).min / 2 if mask.is_floating_point() else itself.bool()
            return sees if sees.shape[1] == self.length else None
        return mask.bool() if mask.dim() == 2 else None

    def _begin(self, model: nn.Module, tasks: Tasks | None, words: Any) -> None:
        """A pass begins, of ``words`` (batch, length) or their embeddings, about which nothing else is known yet."""
        self.tasks = tasks
        # once for all layers: a GPU has to be waited for
        self._span = (int(tasks.min()), int(tasks.max())) if _some(tasks) else None
        self.batch = len(words) if isinstance(words, Tensor) else None
        self.length = words.shape[1] if isinstance(words, Tensor) and words.dim() > 1 else None
        self._words = words if isinstance(words, Tensor) and not words.is_floating_point() else None
        config, self._pictured = getattr(model, "config", None), None
        self._image = getattr(config, "image_token_id", getattr(config, "image_token_index", None))
        self.padding = self.prompt = None
        self.decoding = self.continues = False

    def _generate(self, model: nn.Module, *args, task: Tasks | None = None, **kwargs):
        ids = kwargs.pop(TASK_IDS, None)
        self._held, self._passes = ids if task is None else task, 0
        # transformers has the pictures seen before the first pass, by a tower that may be adapted
        words = next((kwargs[key] for key in ("input_ids", "inputs") if kwargs.get(key) is not None), None)
        self._begin(model, self._held, args[0] if args and words is None else words)
        try:
            return type(model).generate(model, *args, **kwargs)
        finally:
            self._held = self._passes = None

    # --- what layers ask --------------------------------------------------------------------------------------------

    def task_ids(self, x: Tensor, known: Sequence[str], language: bool = True) -> Tensor:
        """The task of every row of ``x`` (rows, ...) as its place in ``known``: (rows,).

        ``language``: whether ``x`` is of a layer of the language model, whose rows are samples. Elsewhere they are
        pictures or tiles of these, and are those of the samples only if each sample has one.

        Raises:
            UserError: if there is no task, an unknown one, or not one for every row.
        """
        listed = ", ".join(known)
        if self.tasks is None:
            raise UserError(
                "this adapter needs the task of every sample: pass task=..., or in a trainer use "
                f"lorasculpt.TaskCollator; it knows {listed}."
            )
        if isinstance(self.tasks, Tensor):
            ids = self.tasks.to(x.device)
            if self._span is not None and not 0 <= self._span[0] <= self._span[1] < len(known):
                raise UserError(f"task ids lie from 0 to {len(known) - 1}: this adapter knows {listed}.")
        else:
            several = isinstance(self.tasks, Iterable) and not isinstance(self.tasks, str)
            names = list(self.tasks) if several else [self.tasks]
            unknown = [name for name in names if name not in known]
            if unknown:
                raise UserError(f"there is no task {unknown[0]!r}; this adapter knows the names {listed}.")
            ids = torch.tensor([known.index(name) for name in names], device=x.device)
        return self._rows(ids, x, language)

    def _rows(self, ids: Tensor, x: Tensor, language: bool) -> Tensor:
        """One id for every row of ``x``: beams and returned sequences follow their sample."""
        rows, samples = x.shape[0], len(ids)
        if rows == samples and (language or self._all_pictured()):
            return ids
        if samples == 1 or bool((ids == ids[0]).all()):
            return ids[:1].expand(rows)
        if language and rows == self.batch and rows % samples == 0:
            return ids.repeat_interleave(rows // samples)
        raise UserError(
            f"{samples} tasks were given for {rows} rows: give one for each sample. In a layer outside the language "
            "model rows are not samples, so there use one task in a batch, or scope: language."
        )

    def _all_pictured(self) -> bool:
        """Whether every sample of this pass is known to have a picture: if there are as many, each has one."""
        if self._pictured is None:
            words, image = self._words, self._image
            known = words is not None and image is not None
            self._pictured = known and bool(torch.eq(words, image).any(1).all())
        return self._pictured

    def apart(self, x: Tensor) -> Tensor:
        """``x`` of a layer of the language model as (rows, length, features), also where all rows come as one.

        The experts that all tokens share in a mixture of experts take them so.
        """
        if x.dim() != 2 or not self.batch or not self.length or len(x) != self.batch * self.length:
            return x
        return x.unflatten(0, (self.batch, self.length))

    def real(self, x: Tensor) -> Tensor | None:
        """(rows, length) True where a token of ``x`` (rows, length, features) is real; None if all are."""
        mask = self.padding
        if mask is None or x.dim() != 3 or mask.shape[0] != x.shape[0] or mask.shape[1] < x.shape[1]:
            return None
        if mask.shape[1] != x.shape[1] and not self.decoding:
            return None  # not a sequence of the language model
        return mask[:, -x.shape[1] :].to(x.device)

    def prompts(self, x: Tensor) -> Tensor | None:
        """(rows, length) True where a token of ``x`` is of the prompt and real; None if labels do not tell."""
        if self.prompt is None or self.prompt.shape != x.shape[:2]:
            return self.real(x)
        real, prompt = self.real(x), self.prompt.to(x.device)
        return prompt if real is None else prompt & real


def _some(tasks: Tasks | None) -> TypeGuard[Tensor]:
    """Whether ``tasks`` are ids, and not none at all."""
    return isinstance(tasks, Tensor) and bool(tasks.numel())
