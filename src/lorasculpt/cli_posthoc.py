"""``lorasculpt posthoc scale | prune | dare | tailor | ties | average``: edits of a finished LoRA."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .errors import UserError

if TYPE_CHECKING:
    from .adapters.plain import Adapter
    from .posthoc import Written

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    help="Edit a finished LoRA without training: turn it down, thin it out, or merge several into one.\n\n"
    "`scale`, `prune` and `average` leave an ordinary LoRA. What `dare`, `tailor` and `ties` leave has no low "
    "rank: it becomes a merged model (`--to merged --base MODEL`), or the nearest LoRA of a rank (`--to lora --rank "
    "64`), and what that loses is printed. Every folder gets a posthoc.json that says how it was made.",
)


class Form(StrEnum):
    """What an update without low rank is written as."""

    merged = "merged"
    lora = "lora"


class By(StrEnum):
    """Which entries DARE drops."""

    random = "random"
    magnitude = "magnitude"


One = Annotated[Path, typer.Argument(help="The folder of a plain LoRA.", show_default=False)]
Several = Annotated[
    list[Path], typer.Argument(help="Folders of plain LoRAs of the same base and layers.", show_default=False)
]
Out = Annotated[Path, typer.Option(help="The folder to write.", show_default=False)]
To = Annotated[Form, typer.Option(help="The whole model with the update merged in, or the nearest LoRA of a rank.")]
Base = Annotated[str | None, typer.Option(help="With --to merged: the adapter's base model.", show_default=False)]
Rank = Annotated[int | None, typer.Option(help="With --to lora: its rank.", min=1, show_default=False)]
Dtype = Annotated[
    str | None,
    typer.Option(help="With --to merged: float32, bfloat16 or float16. Default: the base's own.", show_default=False),
]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the code that comes with the base. Only if you have read it.")
]
Weights = Annotated[str | None, typer.Option(help="A number for each adapter, such as 0.7,0.3.", show_default=False)]


@app.command()
def scale(
    adapter: One,
    by: Annotated[float, typer.Option(help="0 is the base, 1 the adapter as it was trained.", show_default=False)],
    out: Out,
) -> None:
    """Interpolate between the base and the tuned model: W0 + by · BA. The simplest way to get some of the base back."""
    from .posthoc import read, write
    from .posthoc import scale as edit

    _say(write(edit(read(adapter), by), out, made=_made("scale", [adapter], by=by)))


@app.command()
def prune(
    adapter: One,
    density: Annotated[float, typer.Option(help="Share of the entries that are kept.", show_default=False)],
    out: Out,
) -> None:
    """Keep the largest entries of every A and every B and set the others to zero."""
    from .posthoc import prune as edit
    from .posthoc import read, write

    _say(write(edit(read(adapter), density), out, made=_made("prune", [adapter], density=density)))


@app.command()
def dare(
    adapter: One,
    p: Annotated[float, typer.Option(help="Share of the entries of BA that is dropped.", show_default=False)],
    out: Out,
    seed: Annotated[int, typer.Option(help="Of what is dropped at random.")] = 0,
    by: Annotated[By, typer.Option(help="Drop at random, or the entries of smallest magnitude.")] = By.random,
    rescale: Annotated[bool, typer.Option(help="Divide what is left by 1 - p.")] = True,
    to: To = Form.merged,
    base: Base = None,
    rank: Rank = None,
    dtype: Dtype = None,
    trust: Trust = False,
) -> None:
    """DARE: drop a share P of the entries of the update BA and divide the rest by 1 - P.

        lorasculpt posthoc dare runs/a/adapter --p 0.5 --base path/to/base --out a-dare

    Dropped at random, the update is noise around the old one, and a LoRA of small rank averages most of that noise out
    again: prefer a merged model.
    """
    from .posthoc import dare as edit
    from .posthoc import read, write

    _check_form(to, base, rank, dtype)
    edited = edit(read(adapter), p, seed=seed, by=by.value, rescale=rescale)
    made = _made("dare", [adapter], p=p, seed=seed, by=by.value, rescale=rescale)
    _say(write(edited, out, base=base, rank=rank, dtype=dtype, made=made, trust_remote_code=trust), rank)


@app.command()
def tailor(
    adapter: One,
    base: Annotated[str, typer.Option(help="The adapter's base model.", show_default=False)],
    data: Annotated[Path, typer.Option(help="Records that the tuned model is run on.", show_default=False)],
    out: Out,
    keep: Annotated[float, typer.Option(help="Share of the weights that do not return to the base.")] = 0.1,
    images: Annotated[
        Path | None, typer.Option(help="Folder of their pictures. Default: that of --data.", show_default=False)
    ] = None,
    limit: Annotated[int, typer.Option(help="How many records of --data at most.", min=1)] = 128,
    released: Annotated[bool, typer.Option(help="Compensate with the sign of the authors' code.")] = False,
    to: To = Form.merged,
    rank: Rank = None,
    dtype: Dtype = None,
    trust: Trust = False,
) -> None:
    """Model Tailor: keep the weights that changed and matter most, return the others, and let the kept ones make up.

        lorasculpt posthoc tailor runs/a/adapter --base path/to/base --data data/train.jsonl --out a-tailored

    Records of the task that was learned tell which weights matter. The authors' code adds the compensation where
    optimal brain surgery subtracts it; `--released` does as it does.
    """
    from .posthoc import calibrate, model_tailor, read, write
    from .posthoc.files import check_out
    from .posthoc.tailor import check_keep

    merge = base if to is Form.merged else None
    _check_form(to, merge, rank, dtype)
    check_keep(keep)  # calibrating takes its time, so that mistakes are told before
    check_out(out)
    found = read(adapter)
    seen = calibrate(found, base, data, limit, images=images, trust_remote_code=trust)
    edited = model_tailor(found, *seen, keep, released=released)
    made = _made("tailor", [adapter], data=str(data), limit=limit, keep=keep, released=released)
    _say(write(edited, out, base=merge, rank=rank, dtype=dtype, made=made, trust_remote_code=trust), rank)


@app.command()
def ties(
    adapters: Several,
    out: Out,
    density: Annotated[float, typer.Option(help="Share of each update's entries that survives trimming.")] = 0.2,
    weights: Weights = None,
    to: To = Form.merged,
    base: Base = None,
    rank: Rank = None,
    dtype: Dtype = None,
    trust: Trust = False,
) -> None:
    """TIES: merge adapters of several tasks; trim each, elect a sign for each entry, average what agrees with it.

        lorasculpt posthoc ties runs/a/adapter runs/b/adapter --base path/to/base --out both

    Weights default to 1 each; the same number for all is the paper's lambda. Of each two updates the cosine is printed
    (below 0 they work against each other) and, of the entries that both change, the share with opposite signs.
    """
    from .posthoc import read, write
    from .posthoc import ties as edit

    _check_form(to, base, rank, dtype)
    found, numbers = [read(adapter) for adapter in adapters], _numbers(weights)
    made = _made("ties", adapters, density=density, weights=numbers, **_interference(found))
    edited = edit(found, density, numbers)
    _say(write(edited, out, base=base, rank=rank, dtype=dtype, made=made, trust_remote_code=trust), rank)


@app.command()
def average(adapters: Several, out: Out, weights: Weights = None) -> None:
    """Average adapters of several tasks into one LoRA whose rank is the sum of theirs: rounding is all that it loses.

        lorasculpt posthoc average runs/a/adapter runs/b/adapter --weights 0.7,0.3 --out both

    Weights default to the mean. Of each two updates the cosine is printed (below 0 they work against each other) and,
    of the entries that both change, the share with opposite signs.
    """
    from .posthoc import average as edit
    from .posthoc import read, write

    found, numbers = [read(adapter) for adapter in adapters], _numbers(weights)
    made = _made("average", adapters, weights=numbers, **_interference(found))
    _say(write(edit(found, numbers), out, made=made))


def _check_form(to: Form, base: str | None, rank: int | None, dtype: str | None) -> None:
    if to is Form.merged and (base is None or rank is not None):
        raise UserError("A merged model takes --base MODEL and no --rank; for a LoRA say --to lora --rank R.")
    if to is Form.lora and (rank is None or base is not None or dtype is not None):
        raise UserError("A LoRA takes --rank R and neither --base nor --dtype; for a merged model say --base MODEL.")


def number_list(option: str, given: str, example: str) -> list[float]:
    """The numbers that were ``given`` for an ``option``, with commas between them."""
    try:
        return [float(number) for number in given.split(",")]
    except ValueError:
        raise UserError(f"{option} is {given!r}; it must be numbers, such as {example}.") from None


def _numbers(weights: str | None) -> list[float] | None:
    return None if weights is None else number_list("--weights", weights, "0.7,0.3")


def _made(edit: str, adapters: Sequence[Path], **settings: Any) -> dict[str, Any]:
    return {"edit": edit, "adapters": [str(adapter) for adapter in adapters], **settings}


def _interference(adapters: Sequence[Adapter]) -> dict[str, list[list[float]]]:
    from .posthoc import cosines, sign_conflicts

    return {"cosines": cosines(adapters), "sign_conflicts": sign_conflicts(adapters)}


def _say(written: Written, rank: int | None = None) -> None:
    """Tell what was ``written``; ``rank`` is the one that was asked for."""
    if "cosines" in written.made:
        names = written.made["adapters"]
        for i, row in enumerate(written.made["cosines"]):
            for j in range(i):
                opposed = 100 * written.made["sign_conflicts"][i][j]
                print(f"cosine of {names[j]} and {names[i]}: {row[j]:+.3f}; {opposed:.1f} % of signs opposite")
    if written.loss:
        why = "rounding" if rank is None else f"rank {rank}"
        print(f"lost to {why}: {100 * written.loss:.2g} % of the update's norm")
    print(f"{written.to}: {written.out}")
