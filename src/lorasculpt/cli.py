"""``lorasculpt fetch | train | eval | dial | compare | report | play | export | posthoc | inspect | methods |
settings | demo``.

Exit codes: 0 done, 1 something broke here, 2 the input has to be mended (one sentence says what), 143 it was
ended from outside.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shlex
import signal
import sys
import warnings
from collections.abc import Collection
from enum import StrEnum
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from tqdm import tqdm

from .cli_posthoc import Trust, number_list
from .cli_posthoc import app as posthoc_app
from .console import numbers
from .errors import UserError
from .files import disk_full
from .memory import ran_out

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Fine-tune a multimodal LLM on your task, keep what it already knew, and see both numbers.\n\n"
    "A run is one YAML file: `lorasculpt train run.yaml`, then `eval`, `report`, `export`. "
    "See it work on a small real model: `lorasculpt demo`.",
)
demo_app = typer.Typer(invoke_without_command=True, add_completion=False, help="See it work on a small real model.")
app.add_typer(demo_app, name="demo")
app.add_typer(posthoc_app, name="posthoc")

# What the system says of a place that the user has named, and the mend.
REFUSED = {
    errno.EACCES: "this user may not read or write there; change its permissions, or name another place.",
    errno.EPERM: "the system does not permit that; change its permissions, or name another place.",
    errno.EROFS: "the disk can only be read; name another place.",
    errno.ENOENT: "there is no such place, and none can be made there; correct it.",
    errno.ENOTDIR: "a part of this path is a file, not a folder; correct it.",
    errno.EISDIR: "this is a folder, and a file is wanted; correct it.",
    errno.EEXIST: "there is a file where a folder is to be made; remove it, or name another place.",
    errno.ENAMETOOLONG: "this name is too long; choose a shorter one.",
}

SPARING = (
    "in training, lower training.batch and raise training.accumulation, or set training.checkpointing: true; in "
    "measuring, lower evaluate.batch; or let the base take less room by dtype: bfloat16 or quantization: 4bit, and "
    "large pictures by image_processor: {max_pixels: 1000000}, or what the base's has in its place."
)

Run = Annotated[Path, typer.Argument(help="The YAML file of the run.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Settings that replace those of the file, such as training.lr=1e-4 method.density=0.05."),
]


class Target(StrEnum):
    """What an adapter can be exported to."""

    lora = "lora"
    merged = "merged"


class Cluster(StrEnum):
    """Where ``compare`` can launch jobs."""

    slurm = "slurm"


@app.command()
def fetch(
    source: Annotated[
        str,
        typer.Argument(help="A dataset on the Hub, a folder, or a .parquet, .csv or .json file.", show_default=False),
    ],
    out: Annotated[Path, typer.Option(help="The folder to write into.", show_default=False)],
    split: Annotated[str, typer.Option(help="Which part of it.")] = "train",
    subset: Annotated[
        str | None, typer.Option(help="Which one, of a dataset that has several.", show_default=False)
    ] = None,
    columns: Annotated[
        str | None,
        typer.Option(help="Its names for our columns, such as question=query,answer=label.", show_default=False),
    ] = None,
    ask: Annotated[
        str | None, typer.Option(help="The question of every row, if the data has none.", show_default=False)
    ] = None,
    limit: Annotated[int | None, typer.Option(help="At most this many rows.", min=1, show_default=False)] = None,
    shuffle: Annotated[bool, typer.Option("--shuffle", help="Take them in a random order, always the same.")] = False,
    every_answer: Annotated[
        bool, typer.Option("--every-answer", help="Keep all answers of a row, as the metric vqa reads them.")
    ] = False,
    skip: Annotated[bool, typer.Option("--skip", help="Leave out rows that cannot be used.")] = False,
) -> None:
    """Make a data file from a dataset on the Hub or a table here: OUT/SPLIT.jsonl, its pictures in OUT/images.

    Rows of question and answer, messages, prompt and completion, conversations, or texts of user and assistant are
    taken as they are. Of a large dataset only what --limit asks for is read.

        lorasculpt fetch HuggingFaceM4/ChartQA --out charts --columns question=query,answer=label
        lorasculpt fetch HuggingFaceM4/the_cauldron --subset ai2d --out ai2d --limit 2000
        lorasculpt fetch pets --out animals --columns answer=label --ask "Which animal is this?"
    """
    from .data.fetch import fetch as go

    named: dict[str, str] = {}
    for pair in columns.split(",") if columns else []:
        ours, equal, theirs = pair.partition("=")
        if not equal or not theirs.strip():
            raise UserError(f"--columns has {pair!r}; write ours=theirs, such as question=query,answer=label.")
        named[ours.strip()] = theirs.strip()
    options: dict[str, Any] = {"subset": subset, "split": split, "limit": limit, "shuffle": shuffle, "ask": ask}
    found = go(source, out, columns=named, every_answer=every_answer, skip=skip, **options)
    if found.left_out:
        print(f"Columns that were left out: {', '.join(found.left_out)}.")
    if found.skipped:
        print(f"Rows that were left out: {found.skipped}.")
    print(f"data: {found.file} ({found.rows} rows, {found.pictures} pictures)")


@app.command()
def train(run: Run, overrides: Overrides = None) -> None:
    """Train the adapter that RUN describes. Goes on by itself from the last checkpoint.

    A run that fits on one screen:

        base: path/or/hub-id
        output: runs/invoices
        method: {name: lorasculpt, r: 32, lora_alpha: 64, density: 0.1, prune_step: 0.05}
        data: {train: data/train.jsonl}
        training: {epochs: 3, batch: 8, lr: 2e-4}
        evaluate: {source: [data/general.jsonl], target: [data/test.jsonl]}

    A row of data is {"image": "a.png", "question": "...", "answer": "...", "task": "..."}; LLaVA, ShareGPT and
    messages rows work too.

    It trains on the GPU if there is one; on several: accelerate launch -m lorasculpt train RUN. A large base takes half
    the memory with dtype: bfloat16, and a quarter of that with quantization: 4bit (which needs bitsandbytes).

    Tasks are learned one after the other where data is {sequence: [{name: ..., train: ..., test: ...}, ...]}; the
    accuracy on every task after each one is written to matrix.json.
    """
    from .config import RunConfig
    from .run.records import check_metrics

    config = RunConfig.load(run, overrides or [])
    check_metrics(config)
    if config.data.sequence:
        from .sequence import learn

        adapter, matrix = learn(config)
        _matrix(matrix)
        print(f"adapter: {adapter}\nmatrix: {matrix}")
        return
    from .train import train as go

    print(f"adapter: {go(config)}")
    if config.evaluate.retain is not None:
        command = shlex.join(["lorasculpt", "eval", str(run), *(overrides or [])])
        print(f"The one that keeps {100 * config.evaluate.retain:g} % is chosen and written by: {command}")


@app.command("eval")
def evaluate(run: Run, overrides: Overrides = None) -> None:
    """Measure RUN's base and adapter on its source and target tasks; writes results.json into the run's folder.

    Without source tasks, evaluate: {drift: 32} tells how far the adapter moved from the base. With evaluate: {retain:
    0.97} the adapter that learns the most among those that keep that share is left in the run's folder too.
    """
    from .config import RunConfig
    from .evaluation.budget import flattered, in_words
    from .measure import measure, retained

    config = RunConfig.load(run, overrides or [])
    path = measure(config)
    _summary([path])
    for found in json.loads(path.read_text())["runs"]:
        if budget := found.get("budget"):
            print(in_words(budget))
            print(retained(config, budget))
            if flatters := flattered(budget):
                print(flatters)
    print(f"results: {path}")


@app.command()
def dial(
    run: Run,
    overrides: Overrides = None,
    retain: Annotated[
        float | None, typer.Option(help="Share of the base to keep. Default: evaluate.retain, or 0.97.")
    ] = None,
    densities: Annotated[
        str, typer.Option(help="Shares of the entries of A and of B to keep, such as 1,0.5,0.2: the adapter pruned.")
    ] = "1",
    write: Annotated[
        Path | None, typer.Option(help="A new folder for the adapter at the chosen setting.", show_default=False)
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the curves into this PNG or SVG.")] = None,
) -> None:
    """Show what RUN's adapter learns and keeps, turned down and pruned, and choose; works without source tasks.

    It is measured at each of evaluate.strengths and, with --densities, also pruned. Of the settings that keep enough,
    the one with the highest target is chosen. Enough is a share of the source score or, without a source, of the
    probability the base gives to its own texts (exp(-drift)).
    """
    from .config import RunConfig
    from .dial import dial as go
    from .dial import plot as draw
    from .evaluation.budget import flattered, in_words, kept

    shares = number_list("--densities", densities, "1,0.5,0.2")
    _check_plot(plot)
    path, found = go(RunConfig.load(run, overrides or []), retain=retain, densities=shares, write=write)
    several = len({point["density"] for point in found["points"]}) > 1
    by, left = kept(found["points"])
    table = numbers("strength", *(["density"] if several else []), "target", "source", "drift", f"kept, by {by}")
    for point, share in zip(found["points"], left, strict=True):
        cells = [f"{point['strength']:g}", *([f"{point['density']:g}"] if several else [])]
        cells += [f"{100 * point[side]:.1f} %" if side in point else "-" for side in ("target", "source")]
        table.add_row(*cells, f"{point['drift']:.3f}", "-" if math.isnan(share) else f"{100 * share:.1f} %")
    Console().print(table)
    print(in_words(found["budget"]))
    if flatters := flattered(found["budget"]):
        print(flatters)
    if plot:
        draw(found, plot)
    wrote = write is not None and found["budget"]["strength"] is not None
    print(f"dial: {path}" + (f"\nadapter: {write}" if wrote else "") + (f"\nplot: {plot}" if plot else ""))
    if write is not None and not wrote:
        raise UserError(f"{write} was not written, because no strength keeps enough; give a smaller --retain.")


@app.command()
def compare(
    run: Run,
    overrides: Overrides = None,
    methods: Annotated[
        str | None,
        typer.Option(help="What to compare, such as lora,lorasculpt,dora. Default: RUN's methods.", show_default=False),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Seeds of each method that does not set its own.")] = 3,
    rates: Annotated[
        str | None,
        typer.Option(
            help="One to three learning rates; each method gets the one that is best for it. Default: "
            "2e-4,5e-4,1.5e-3; for a sequence without validation, training.lr.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The file to write. Default: compare.json in RUN's output.", show_default=False)
    ] = None,
    dry_run: Annotated[
        bool, typer.Option(help="Print the commands that are still to be run, for other machines; run nothing.")
    ] = False,
    launch: Annotated[
        Cluster | None, typer.Option(help="Make every run as a job of a cluster, and wait here.", show_default=False)
    ] = None,
    job: Annotated[
        str | None,
        typer.Option(
            help="With --launch: options of submitit, such as timeout_min=120,gpus_per_node=1,slurm_partition=gpu.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Train and measure several methods on RUN's data, with several seeds, and say what is learned and forgotten.

    Started again, it goes on where it was stopped. Runs that were made elsewhere are taken over, from their folders or
    from the file that it writes (--out), which alone is enough to go on from.

    A label has the settings of a method, besides those that it takes from RUN's own. It may also have a rate (or the
    label whose rate it takes), a number of seeds and a share of general data, or be an edit of what another learned:

        methods:
          lora: {r: 16, seeds: 5}
          sparser: {name: lorasculpt, density: 0.05, lr: 1e-3}
          replay: {name: lora, replay: 0.1, lr: lora}
          milder: {of: lora, edit: scale, by: 0.7}   # or prune, dare, tailor

    Learning rates are chosen on evaluate.validation (default: a tenth of the training rows), never on the test.
    Where evaluate names no source, what is kept goes by its drift: the base's probability of its own texts.
    PEFT's own (dora, pissa, osf, ...: see lorasculpt methods) are methods too. Where data is a sequence, tasks are
    learned in turn, at the rate that does best on the validation file of each; where one has none, at training.lr or
    the one rate of --rates.
    """
    from . import compare as comparing
    from .comparison import sequences, table
    from .comparison.launch import options_of
    from .config import RunConfig

    config, names = RunConfig.load(run, overrides or []), methods.split(",") if methods else None
    tried = number_list("--rates", rates, "2e-4,5e-4,1.5e-3") if rates else None
    if dry_run:
        path = out or config.output / comparing.COMPARISON_FILE
        for line in comparing.commands(comparing.planned(config, names, seeds, tried, path)):
            print(line)
        return
    if job and not launch:
        raise UserError("--job sets options for the jobs that --launch starts; add --launch slurm or remove it.")
    cluster = launch.value if launch else None
    path = comparing.compare(config, names, seeds=seeds, rates=tried, out=out, cluster=cluster, job=options_of(job))
    record = json.loads(path.read_text())
    (sequences if "sequences" in record else table).show(record)
    print(f"results: {path}")


@app.command()
def report(
    results: Annotated[
        list[Path], typer.Argument(help="results.json, compare.json or matrix.json files.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="The folder to write into.")] = Path("report"),
) -> None:
    """Make one self-contained page (report.html), and the same numbers as Markdown and JSON.

    Where a run's folder has its adapter, the page shows what the adapter is made of. After this command it also shows
    which expert serves what:

        lorasculpt inspect RUN/adapter --base BASE --data FILE --json RUN/inspect.json
    """
    from .report.page import report as go

    print(f"report: {go(results, out)}")


@app.command()
def play(
    paths: Annotated[
        list[Path],
        typer.Argument(help="Run files, or folders of adapters; all of one base.", show_default=False),
    ],
    base: Annotated[str | None, typer.Option(help="The base, where no run file names it.", show_default=False)] = None,
    port: Annotated[
        int | None, typer.Option(help="Of the page. Default: the first free one from 7860.", show_default=False)
    ] = None,
    browse: Annotated[bool, typer.Option(help="Open the page in the browser.")] = True,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.", min=1)] = 64,
) -> None:
    """Ask the base and its adapters the same question about the same picture, side by side, on a local page.

    Name the files of runs, or folders of adapters with the base that they are of:

        lorasculpt play runs/a.yaml runs/b.yaml
        lorasculpt play runs/a/adapter --base path/to/base

    The page is served to this machine alone. It needs Gradio: pip install 'lorasculpt[play]'.
    """
    from .play import play as go

    go(paths, base, port=port, browse=browse, max_new_tokens=max_new_tokens)


@app.command()
def export(
    adapter: Annotated[Path, typer.Argument(help="The adapter's folder.", show_default=False)],
    base: Annotated[str, typer.Option(help="The model it was trained on.", show_default=False)],
    out: Annotated[Path, typer.Option(help="The folder to write.", show_default=False)],
    to: Annotated[
        Target, typer.Option(help="A plain LoRA, or the whole model with the adapter merged in.")
    ] = Target.lora,
    task: Annotated[
        str | None, typer.Option(help="Of an adapter that knows tasks: which one, or all, each into a folder in OUT.")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32, bfloat16 or float16. Default: that of the LoRA; of a merged model that of the base.",
            show_default=False,
        ),
    ] = None,
    force: Annotated[bool, typer.Option(help="Replace an earlier export.")] = False,
    trust: Trust = False,
) -> None:
    """Write the adapter in a form that other programs load, and check that it answers as before."""
    from .export import another_base, config_of
    from .export import export as go

    config = config_of(adapter) if task == "all" else None
    wanted: list[tuple[str | None, Path]] = [(task, out)]
    if config is not None and config.merges == "task":
        folders = [re.sub(r"[^\w-]+", "_", name) for name in config.tasks]
        if len(set(folders)) < len(folders):
            folders = [f"{number}-{folder}" for number, folder in enumerate(folders, start=1)]
        wanted = [(name, out / folder) for name, folder in zip(config.tasks, folders, strict=True)]
    for name, folder in wanted:
        go(adapter, base, folder, to.value, task=name, dtype=dtype, force=force, trust_remote_code=trust)
        print(f"exported: {folder}")
    if (other := another_base(adapter, base)) is not None:
        print(f"The adapter was trained on {other}; whether {base} is that model is not checked.")


@app.command("inspect")
def inspect_(
    adapter: Annotated[Path, typer.Argument(help="The adapter's folder.", show_default=False)],
    base: Annotated[
        str | None,
        typer.Option(
            help="The model, a folder or a name on the Hub: adds the overlap with large weights. An adapter that is no "
            "LoRA needs it.",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Records to run through an adapter that routes: which expert serves what.")
    ] = None,
    limit: Annotated[int, typer.Option(help="How many records of --data at most.", min=1)] = 64,
    layers: Annotated[bool, typer.Option(help="Every layer, not only each kind of layer.")] = False,
    to_json: Annotated[Path | None, typer.Option("--json", help="Write the numbers to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw them into this PNG or SVG.")] = None,
    trust: Trust = False,
) -> None:
    """Show what an adapter does: where its update lies, how dense it is, which expert serves which task."""
    from .inspect import lora, update

    _check_plot(plot)
    plain = update.config_of(adapter) is None
    if plain and data:
        raise UserError(f"the adapter in {adapter} routes nothing, so --data can show nothing: leave it out.")
    looking: Any = lora if plain else update
    if plain:
        found: Any = lora.inspect(adapter, base)
    else:
        found = update.inspect(adapter, base, data, limit, trust_remote_code=trust)
    looking.show(found, layers=layers)
    if to_json:
        looking.write_json(found, to_json)
    if plot:
        from .inspect import plots  # slow to import, and not needed for the tables

        (plots.of_lora if plain else plots.of_update)(found, plot)
    for written in filter(None, (to_json, plot)):
        print(f"written: {written}")


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="Show this method's settings.", show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the methods: what they need, cost and leave behind. Or one method's settings and their defaults."""
    from .kinds import KINDS, OF_PEFT, listed_where
    from .methods import METHODS
    from .overview import facts, meanings

    if name is not None and name not in METHODS:
        if name in KINDS:
            raise UserError(f"{name} is PEFT's; its settings are not listed here: {listed_where(name)}.")
        raise UserError(f"no method is called {name!r}; there are {', '.join(METHODS)}.")
    chosen = [METHODS[name]] if name else list(METHODS.values())
    found = [facts(config) for config in chosen]
    if as_json:
        print(json.dumps(found, indent=2))
    elif name:
        table = Table("setting", "default", "meaning")
        told = meanings(METHODS[name])
        for key, value in found[0]["settings"].items():
            table.add_row(*map(escape, (key, str(value), _plain(told[key]))))
        Console().print(table)
        print("Besides these it takes what LoraConfig takes: r, lora_alpha, lora_dropout, exclude_modules, ...")
    else:
        _methods(found)
        print(f"Also trained and compared, by PEFT: lora, {', '.join(OF_PEFT)}.")


@app.command()
def settings(
    section: Annotated[
        str | None, typer.Argument(help="A part of the file, such as training, or one setting.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the settings of a run's YAML file: what each is, its default and what it means."""
    from dataclasses import asdict

    from .reference import settings as listed

    found = listed(section)
    if as_json:
        print(json.dumps([asdict(one) for one in found], indent=2))
        return
    table = Table("setting", "default", "meaning", show_lines=True)
    for one in found:
        table.add_row(*map(escape, (one.key, one.default or "–", f"{_plain(one.meaning)} ({one.kind})")))
    Console().print(table)
    if section in (None, "method"):
        print("The settings of a method: lorasculpt methods NAME.")


@demo_app.callback()
def demo(
    context: typer.Context,
    full: Annotated[bool, typer.Option(help="The whole evaluation, on every held-out item.")] = False,
    out: Annotated[Path, typer.Option(help="The folder to write into.")] = Path("demo-run"),
    target: Annotated[str, typer.Option(help="What is learned: digits, or flags (harder).")] = "digits",
) -> None:
    """Teach a small real vision-language model something new, twice, and see what each run learned and forgot."""
    if context.invoked_subcommand is None:
        from .demo.run import demo as go
        from .demo.world import TARGETS

        _check_target(target, TARGETS)
        _summary(go(out, target=target, full=full))


@demo_app.command()
def build(
    out: Annotated[Path, typer.Option(help="The file to write.")] = Path("alignment.safetensors"),
    log: Annotated[Path, typer.Option(help="Where every measurement goes.")] = Path("alignment.jsonl"),
    start: Annotated[Path | None, typer.Option(help="An earlier alignment to go on from.")] = None,
    recipe: Annotated[list[str] | None, typer.Argument(help="Its settings, such as minutes=36 dropout=0.1.")] = None,
) -> None:
    """Align the demo's base model anew (its alignment ships with the package; about an hour).

    The settings are those of lorasculpt.demo.build.Recipe; docs/log.md has the four stretches of what ships.
    """
    from .demo.build import build as go
    from .demo.build import recipe_of

    go(out, log, recipe_of(recipe or []), start)


@demo_app.command()
def results(
    work: Annotated[Path, typer.Option(help="Where the runs go; what is done there is not done again.")] = Path("runs"),
    out: Annotated[
        Path | None,
        typer.Option(
            help="The file to write. Default: results/demo.json, of another target results/TARGET.json, with --others "
            "results/others.json.",
            show_default=False,
        ),
    ] = None,
    target: Annotated[
        str,
        typer.Option(
            help="What is learned: digits; flags (harder); tasks, these two and a third at once, with the methods that "
            "are made for several; sequence, the three in turn."
        ),
    ] = "digits",
    others: Annotated[bool, typer.Option("--others", help="More baselines, beside LoRA and LoRASculpt.")] = False,
) -> None:
    """Make the project's own evidence: LoRA, LoRASculpt and what it is compared with, several seeds (many hours).

    Rates are chosen on validation sets. It goes on where it was stopped; what is done can be read at any time.
    """
    from .demo.results import SEVERAL, TARGETS
    from .demo.results import results as go

    _check_target(target, TARGETS)
    if others and target in SEVERAL:
        raise UserError(f"--others works with a target of one task; leave it out, or use another target than {target}.")
    print(f"results: {go(work, out, target=target, others=others)}")


@demo_app.command()
def knows(
    work: Annotated[Path, typer.Option(help="Where its questions go.")] = Path("runs"),
    out: Annotated[Path, typer.Option(help="The file to write.")] = Path("results/base.json"),
) -> None:
    """Measure what the demo's base knows, with the right pictures and with shuffled ones (some minutes)."""
    from .demo.study import knows as go

    print(f"results: {go(work, out)}")


@demo_app.command()
def study(
    work: Annotated[Path, typer.Option(help="Where the runs go; what is done there is not done again.")] = Path("runs"),
    out: Annotated[Path, typer.Option(help="The file to write.")] = Path("results/study.json"),
) -> None:
    """Change one setting of LoRASculpt at a time: where it learns too little, enough, too much (about an hour)."""
    from .demo.study import study as go

    print(f"results: {go(work, out)}")


def _check_target(name: str, known: Collection[str]) -> None:
    if name not in known:
        raise UserError(f"there is no target {name!r}; use one of {', '.join(known)}.")


def _methods(found: list[dict[str, Any]]) -> None:
    """Print what there is to know about each method: in words, and what can be compared."""
    words, table = (
        Table("method", "idea, and how sure the reproduction is"),
        Table("method", "tasks", "clock", "size", "export"),
    )
    for fact in found:
        size = fact["parameters"]
        kept = size["kept"] / size["trained"] * size["of_lora"]
        words.add_row(fact["method"], f"{fact['idea']}\n[dim]{fact['sure']}[/dim]")
        table.add_row(
            fact["method"],
            fact["tasks"] or "-",
            "yes" if fact["clock"] else "for logs",
            f"{size['of_lora']:.1f}" + (f" + {kept:.1f}" if kept >= 0.05 else ""),
            ", ".join(fact["exports"]) + (" per task" if fact["per_task"] else "") or "-",
        )
    Console().print(words, table)
    print(
        "tasks: whether every sample needs the name of its own; used: only where they are given.\n"
        "clock: whether a loop of one's own needs Clock or ClockCallback.\n"
        f"size: trained parameters of a linear of {found[0]['parameters']['features']} features, over those of a LoRA\n"
        "of the default rank (8 where there is none), + what is saved but not trained."
    )


def _summary(results: list[Path]) -> None:
    """Print what each run learned and kept, task by task, beside the base, with 95 % intervals."""
    from .console import NONE, duration, size
    from .report.results import measured
    from .report.words import bracket, by_heart, percent

    runs = [run for path in results for run in json.loads(path.read_text())["runs"]]

    def told(found: dict[str, Any], name: str) -> str:
        number = measured(found, name)
        return f"{percent(number.value)} {bracket(number)}".rstrip()

    def drift(run: dict[str, Any]) -> str:
        found = run.get("drift")
        return "{:.3f} [{:.3f}, {:.3f}]".format(found["value"], *found["interval"]) if found else NONE

    table = Table("%", "base", *(f"{run['method']}\nseed {run['seed']}" for run in runs), box=box.SIMPLE_HEAD)
    for side in ("source", "target"):
        tasks = list(runs[0][side])
        for task in tasks:
            of = [run[side][task] for run in runs]
            table.add_row(task, told(of[0], "before"), *(told(found, "after") for found in of))
        if tasks:
            of = [run["summary"] for run in runs]
            after = [told(found, f"{side}_after") for found in of]
            table.add_row(side.upper(), told(of[0], f"{side}_before"), *after, end_section=True)
    for name, words in (("retention", "retention"), ("gain", "gain"), ("h_mean", "H-mean"), ("average", "average")):
        table.add_row(words, "", *(told(run["summary"], name) for run in runs))
    if any("drift" in run for run in runs):
        table.add_row("drift (nats)", "", *map(drift, runs))
    table.add_row("training time", "", *(duration(run["seconds"]) for run in runs))
    table.add_row("adapter size", "", *(size(run["adapter_bytes"]) for run in runs))
    Console(markup=False).print(table)  # a task may be called as a mark is
    print(
        "SOURCE, TARGET: the mean over the tasks above them. In brackets: 95 % intervals\n"
        "over the questions; they don't show how another seed would differ."
    )
    for sentence in dict.fromkeys(filter(None, map(by_heart, runs))):
        print(sentence)


def _matrix(path: Path) -> None:
    """Print how well each task was done after each."""
    record = json.loads(path.read_text())
    table = numbers("", *record["tasks"], "source")
    for row in record["rows"]:
        cells = ["-" if value is None else f"{100 * value:.1f} %" for value in (*row["accuracy"], row["source"])]
        table.add_row(f"after {row['after']}" if row["after"] else "before", *cells)
    Console().print(table)
    points = {key: 100 * record[key] for key in ("last", "average", "backward", "forward") if record[key] is not None}
    print(f"after the last {points['last']:.1f} %, mean over stages of those learned by then {points['average']:.1f} %")
    if "backward" in points:
        print(f"backward transfer {points['backward']:+.1f}, forward transfer {points['forward']:+.1f}")


def main() -> None:
    """Run the command line; a user's mistake is one sentence and exit code 2."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.warnoptions:
        warnings.simplefilter("ignore", FutureWarning)  # of the libraries underneath, which the user cannot mend
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:  # of several, one may wait for another, and is to end at once
        signal.signal(signal.SIGTERM, _end)
    try:
        app()
    except UserError as error:
        _refuse(str(error))
    except Exception as error:
        place = getattr(error, "filename", None)
        if disk_full(error):
            told = f"the disk has no room left ({place or 'while writing'}); make some and run it again."
        elif place is not None and isinstance(error, OSError) and error.errno in REFUSED:
            told = f"{place}: {REFUSED[error.errno]}"
        elif (said := ran_out(error)) is not None:
            told = f"{said}; {SPARING}"
        else:
            raise
        _refuse(told)


def _end(number: int, frame: FrameType | None) -> NoReturn:
    """End as the system would, but clear away first what is half written: a model may be gigabytes."""
    sys.exit(128 + number)


def _plain(docstring: str) -> str:
    """Text of a docstring as a terminal has it."""
    return re.sub(r"``|:\w+:`~?\.?([^`]+)`", r"\1", docstring).replace("`", "")


def _check_plot(plot: Path | None) -> None:
    if plot and plot.suffix not in (".png", ".svg"):
        raise UserError(f"--plot is {plot}; its name must end in .png or .svg.")


def _refuse(told: str) -> NoReturn:
    """End with 2 after one sentence, on a line of its own where a progress bar stands."""
    tqdm.write(f"lorasculpt: {told}", file=sys.stderr)
    sys.exit(2)
