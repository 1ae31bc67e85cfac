"""The commands and their options. Each body imports what it needs, so `--help` costs little."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from typer.exceptions import TyperException

from runtime.segments import map_by_pages, number_by_bus
from tuner import __version__
from tuner.exits import DONE, REFUSED, STOPPED
from tuner.screen import err, out, prepare

app = typer.Typer(
    name="tuner",
    help="Fine-tune diffusion models from a TOML recipe.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80},
)

RecipeArgument = Annotated[
    Path, typer.Argument(metavar="RECIPE", help="A recipe (.toml).", show_default=False)
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override one key, as in the file: --set train.epochs=2",
        show_default=False,
    ),
]
StrictOption = Annotated[bool, typer.Option("--strict", help="Treat warnings as errors.")]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]

OutOption = Annotated[
    Path | None,
    typer.Option("--out", metavar="FILE", help="A file instead of stdout.", show_default=False),
]
PLAN_HELP = "A recipe, a plan.lock.toml, or the folder of a run."


def _version(wanted: bool) -> None:
    if wanted:
        out(f"tuner {__version__}")
        raise typer.Exit(DONE)


@app.callback()
def _tuner(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Fine-tune diffusion models from a TOML recipe."""


@app.command()
def plan(
    recipe: RecipeArgument,
    set_: SetOption = None,
    json: JsonOption = False,
    verbose: Annotated[
        bool, typer.Option("-v", "--verbose", help="Every setting and where it came from.")
    ] = False,
    strict: StrictOption = False,
    explain: Annotated[
        str,
        typer.Option(
            "--explain",
            metavar="KEY",
            help="One key: its value, who gave it and why, what it may be.",
            show_default=False,
        ),
    ] = "",
    device: Annotated[
        str,
        typer.Option(
            "--device",
            metavar="DEVICE",
            help='Plan for a device that is not here: "rtx-4090", or its memory: "24 GiB". '
            "A budget that is stated stays.",
            show_default=False,
        ),
    ] = "",
) -> int:
    """Say what `run` would do: steps, data, memory, every setting. Writes nothing."""
    from tuner.plan import show_plan

    return show_plan(
        recipe,
        set_ or (),
        as_json=json,
        verbose=verbose,
        strict=strict,
        explain=explain,
        device=device,
    )


@app.command()
def run(
    recipe: Annotated[
        Path,
        typer.Argument(
            metavar="RECIPE_OR_LOCK",
            help="A recipe, or the plan.lock.toml of a run.",
            show_default=False,
        ),
    ],
    set_: SetOption = None,
    accept_change: Annotated[
        list[str] | None,
        typer.Option(
            "--accept-change",
            metavar="KEY",
            help="Go on with a begun run although this key of the plan differs.",
            show_default=False,
        ),
    ] = None,
    strict: StrictOption = False,
    offline: Annotated[
        bool,
        typer.Option("--offline", help="Ask no network: what is not on this machine is an error."),
    ] = False,
) -> int:
    """Cache, train, validate and save. Run it again and it goes on where it was."""
    from tuner.run import run_recipe

    return run_recipe(
        recipe, set_ or (), accepted=accept_change or (), strict=strict, offline=offline
    )


@app.command()
def data(
    recipe: RecipeArgument,
    set_: SetOption = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="Else NAME-data.html.", show_default=False),
    ] = None,
    most: Annotated[
        int, typer.Option(min=1, max=500, help="Pictures of each bucket at most.")
    ] = 12,
    open_: Annotated[bool, typer.Option("--open", help="Show it in the browser.")] = False,
) -> int:
    """Write a page of what the model will see: crops, masks, captions, what is skipped."""
    from tuner.data import show_data

    return show_data(recipe, set_ or (), path=out, most=most, open_it=open_)


cache_app = typer.Typer(help="See and tidy what is cached.", no_args_is_help=True)
app.add_typer(cache_app, name="cache")
FolderOption = Annotated[
    Path | None,
    typer.Option(
        "--path", metavar="FOLDER", help="A cache; else the user's own.", show_default=False
    ),
]


@cache_app.command("list")
def list_(path: FolderOption = None, json: JsonOption = False) -> int:
    """Say how much is cached, how old it is, and which run uses it."""
    from tuner.cache import list_cache

    return list_cache(path, as_json=json)


@cache_app.command()
def verify(path: FolderOption = None) -> int:
    """Read all that is cached and name what is damaged."""
    from tuner.cache import verify_cache

    return verify_cache(path)


@cache_app.command()
def prune(
    path: FolderOption = None,
    older: Annotated[
        str, typer.Option(metavar="TIME", help='Unused that long: "30 d".', show_default=False)
    ] = "",
    unused: Annotated[
        bool, typer.Option("--unused", help="Used by no run that is still there.")
    ] = False,
    most: Annotated[
        str,
        typer.Option(
            "--size", metavar="SIZE", help='Down to this size: "20 GiB".', show_default=False
        ),
    ] = "",
    yes: Annotated[bool, typer.Option("--yes", help="Do it; else only say what would go.")] = False,
) -> int:
    """Remove what is cached; deleting costs only the time to make it anew."""
    from tuner.cache import prune_cache

    return prune_cache(path, older=older, unused=unused, most=most, really=yes)


@app.command()
def new(
    file: Annotated[
        Path | None,
        typer.Argument(metavar="FILE", help="Where to; else NAME.toml.", show_default=False),
    ] = None,
    family: Annotated[str, typer.Option(help="Model family.", show_default=False)] = "",
    base: Annotated[str, typer.Option(help="A hub id or a folder.", show_default=False)] = "",
    data: Annotated[str, typer.Option(help="A folder of images.", show_default=False)] = "",
    caption: Annotated[
        str, typer.Option(help="One caption for all images.", show_default=False)
    ] = "",
    method: Annotated[
        str, typer.Option(metavar="lora|full", help="What is trained.", show_default=False)
    ] = "",
    budget: Annotated[
        str, typer.Option(help='Device memory: "24 GiB", auto or none.', show_default=False)
    ] = "",
    name: Annotated[str, typer.Option(help="Name of the run.", show_default=False)] = "",
) -> int:
    """Make a commented recipe and plan it. What is not given is asked on a terminal."""
    from tuner.new import Answers, new_recipe

    answers = Answers(
        family=family,
        base=base,
        data=data,
        caption=caption,
        method=method,
        budget=budget,
        name=name,
    )
    return new_recipe(file, answers)


@app.command()
def diff(
    old: Annotated[Path, typer.Argument(metavar="A", help=PLAN_HELP, show_default=False)],
    new: Annotated[Path, typer.Argument(metavar="B", help=PLAN_HELP, show_default=False)],
    json: JsonOption = False,
) -> int:
    """Say what two plans do differently.

    What alters the trained weights is marked with `!`. Exits with 0 whether or not they differ;
    `--json` says `equal`.
    """
    from tuner.diff import show_difference

    return show_difference(old, new, as_json=json)


@app.command()
def explain(
    code: Annotated[
        str,
        typer.Argument(
            metavar="CODE",
            help="Or a key of the recipe. Without it: all codes.",
            show_default=False,
        ),
    ] = "",
) -> int:
    """Say what a diagnostic's code means, or a key."""
    from tuner.explain import explain_code

    return explain_code(code)


@app.command()
def schema(out: OutOption = None) -> int:
    """Write the recipe language as JSON Schema, for editors."""
    from tuner.schema import write_schema

    return write_schema(out)


@app.command()
def reference(
    out: OutOption = None,
    families: Annotated[
        bool, typer.Option("--families", help="What is supported of which model, instead.")
    ] = False,
) -> int:
    """Write a page of every key of a recipe."""
    from tuner.reference import write_reference

    return write_reference(out, families=families)


@app.command()
def doctor(
    recipe: Annotated[
        Path | None,
        typer.Argument(metavar="[RECIPE]", help="A recipe to judge.", show_default=False),
    ] = None,
    json: JsonOption = False,
    online: Annotated[
        bool, typer.Option("--online", help="Also ask whether the hub answers (5 s at most).")
    ] = False,
) -> int:
    """Say what this machine is and what it allows."""
    from tuner.doctor import show_machine

    return show_machine(recipe=recipe, as_json=json, online=online)


@app.command()
def report(
    run_folders: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Folders of runs.", show_default=False),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FILE",
            help="Of several runs: else comparison.html.",
            show_default=False,
        ),
    ] = None,
) -> int:
    """Write report.html of a run anew, or a page that compares several."""
    from tuner.report import rewrite_report
    from tuner.report_compare import compare

    if len(run_folders) == 1 and out is None:
        return rewrite_report(run_folders[0])
    return compare(run_folders, out)


RunArgument = Annotated[
    Path, typer.Argument(metavar="RUN", help="The folder of a run.", show_default=False)
]
CheckpointOption = Annotated[
    int | None,
    typer.Option(
        "--checkpoint", metavar="STEP", help="Of this step; else the result.", show_default=False
    ),
]
EmaOption = Annotated[
    bool | None,
    typer.Option("--ema/--no-ema", help="The moving average, if there is one.", show_default=False),
]


@app.command()
def status(run_folder: RunArgument, json: JsonOption = False) -> int:
    """Say what a run is doing, or how it ended."""
    from tuner.status import show_status

    return show_status(run_folder, as_json=json)


@app.command()
def sample(
    run_folder: RunArgument,
    prompt: Annotated[
        list[str], typer.Option(help="What to draw; may be given often.", show_default=False)
    ],
    negative: Annotated[
        str | None, typer.Option(help="Negative prompt; else the run's.", show_default=False)
    ] = None,
    size: Annotated[
        str, typer.Option(metavar="WxH", help="Pixels; else the run's.", show_default=False)
    ] = "",
    guidance: Annotated[
        float | None, typer.Option(min=0, help="Guidance; else the run's.", show_default=False)
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Sampling steps; else the run's.", show_default=False)
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="First seed; else the run's.", show_default=False)
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Pictures of each prompt.")] = 1,
    checkpoint: CheckpointOption = None,
    ema: EmaOption = None,
    device: Annotated[
        str, typer.Option(help='"cpu", "cuda"; else the run\'s.', show_default=False)
    ] = "",
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FOLDER", help="Else RUN/drawn.", show_default=False),
    ] = None,
) -> int:
    """Draw pictures by a run's weights, as its validation draws them."""
    from tuner.sample import sample_run

    return sample_run(
        run_folder,
        prompt,
        negative=negative,
        size=size,
        guidance=guidance,
        steps=steps,
        seed=seed,
        count=count,
        step=checkpoint,
        ema=ema,
        device=device,
        place=out,
    )


@app.command()
def export(
    run_folder: RunArgument,
    format: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="diffusers|kohya|comfyui|peft|lycoris",
            help="An adapter's keys; else as its kind is kept.",
            show_default=False,
        ),
    ] = "",
    checkpoint: CheckpointOption = None,
    merge: Annotated[bool, typer.Option("--merge", help="The LoRA into its base.")] = False,
    single_file: Annotated[
        bool, typer.Option("--single-file", help="A whole model in one file.")
    ] = False,
    everything: Annotated[
        bool,
        typer.Option("--everything", help="Also what published files leave out: text encoders."),
    ] = False,
    bundle: Annotated[
        bool,
        typer.Option("--bundle", help="New words in the LoRA's own file too (kohya's keys)."),
    ] = False,
    precision: Annotated[
        str,
        typer.Option(
            metavar="fp32|bf16|fp16", help="Else that of the weights.", show_default=False
        ),
    ] = "",
    ema: EmaOption = None,
    resize: Annotated[
        str,
        typer.Option(
            metavar="RANK|SHARE",
            help="A LoRA of this rank, or of the rank that keeps this share (95%).",
            show_default=False,
        ),
    ] = "",
    extract: Annotated[
        Path | None,
        typer.Option(
            metavar="TUNED",
            help="No run: a LoRA of what this model has more than the one named first.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="PATH", help="Else in RUN/export.", show_default=False),
    ] = None,
) -> int:
    """Write a run's weights for other programs."""
    from tuner.export import export_run, extract_lora

    if extract is not None:
        given = checkpoint is not None or merge or single_file or ema is not None
        words = {"format": format, "precision": precision, "resize": resize}
        return extract_lora(run_folder, extract, place=out, of_a_run=given, **words)
    return export_run(
        run_folder,
        resize=resize,
        format=format,
        step=checkpoint,
        merge=merge,
        single_file=single_file,
        everything=everything,
        bundle=bundle,
        precision=precision,
        ema=ema,
        place=out,
    )


def run_command(arguments: Sequence[str]) -> int:
    """Run one command line; returns the exit code and lets no traceback reach the screen."""
    prepare()
    map_by_pages()
    number_by_bus()
    try:
        code = app(args=list(arguments), prog_name="tuner", standalone_mode=False)
    except TyperException as error:
        return _usage(error)
    except (KeyboardInterrupt, typer.Abort):
        return STOPPED
    except Exception as error:
        from tuner.crash import report_bug

        return report_bug(error, arguments)
    return code if isinstance(code, int) else DONE


def _usage(error: TyperException) -> int:
    """A wrong command line: what is wrong, and where the right form is told."""
    message = error.format_message().rstrip(".")
    if message.startswith("Usage:"):  # no command at all: the message is the help
        err(message)
        return REFUSED
    err(f"error: {message[:1].lower()}{message[1:]}")
    command = getattr(getattr(error, "ctx", None), "command_path", "tuner")
    err(f"help: `{command} --help` lists what it takes")
    return REFUSED
