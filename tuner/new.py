"""`tuner new`: a commented recipe from a few answers, planned at once."""

from __future__ import annotations

import os
import sys
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from attrs import evolve, frozen

from tuner.exits import FAILED, REFUSED
from tuner.schema import DIRECTIVE, NAME
from tuner.screen import err

if TYPE_CHECKING:
    from compiler.families.card import FamilyCard

METHODS = ("lora", "full")
SOME = 16  # images; of fewer each is an update of its own
RATES = {"lora": "1e-4", "full": "1e-5"}


class NotAnswered(Exception):
    """A wrong answer; the message is a sentence, `help` what to say instead."""

    def __init__(self, message: str, help: str = "") -> None:
        super().__init__(message)
        self.help = help


@frozen(kw_only=True)
class Answers:
    """What a person said; "" is not said yet."""

    family: str = ""
    base: str = ""
    data: str = ""
    caption: str = ""
    method: str = ""
    budget: str = ""
    name: str = ""


def new_recipe(file: Path | None, answers: Answers) -> int:
    """Write a recipe to `file` and plan it; the plan's exit code, or 2 if an answer is wrong."""
    from tuner.plan import show_plan

    try:
        answers = _asked(answers) if sys.stdin.isatty() else _complete(answers)
        path = file or Path(f"{answers.name}.toml")
        _checked(answers)
        _write(path, recipe_text(answers, path))
    except NotAnswered as error:
        err(f"error: {error}" + (f"\nhelp: {error.help}" if error.help else ""))
        return REFUSED
    except FileExistsError:
        err(f"error: `{path}` is there already, and is left as it is\nhelp: give another file name")
        return REFUSED
    except OSError as error:
        err(f"error: `{path}` can't be written: {error.strerror or error}")
        return FAILED
    err(f"wrote {path}; this is what it would do\n")
    return show_plan(path, ())


def recipe_text(answers: Answers, path: Path) -> str:
    """The recipe as it will stand at `path`; folders are written relative to it."""
    folder = path.parent.resolve()
    schema = schema_line(folder)
    return (f"{schema}\n" if schema else "") + "\n".join(
        [
            f"# {answers.name}: {_title(answers)}.",
            "# Any key left out has a default: `tuner plan -v` shows them all, `tuner reference`",
            "# explains them. Run it with `tuner run`, as often as you like: it goes on.",
            "schema = 1",
            f"name = {_quoted(answers.name)}",
            "seed = 42",
            "",
            *_model(answers, folder),
            *_adapter(answers),
            *_memory(answers),
            *_data(answers, folder),
            *_train(answers),
            *_validation(answers),
            "",
        ]
    )


def schema_line(folder: Path) -> str:
    """Line 1 for editors: the shipped schema, relative within a checkout, else as an address.

    Returns "" where no schema is installed: a line that leads nowhere makes editors complain.
    """
    from tuner.shelf import shelf

    place = shelf()
    if place is None or not (place / NAME).is_file():
        return ""
    target = (place / NAME).resolve()
    if folder.is_relative_to(target.parent.parent):
        relative = os.path.relpath(target, folder).replace(os.sep, "/")
        return f"{DIRECTIVE} {relative if relative.startswith('.') else './' + relative}"
    return f"{DIRECTIVE} {target.as_uri()}"


def _complete(answers: Answers) -> Answers:
    """The answers with defaults where one is right for most; there is nobody to ask."""
    if answers.family:
        _family(answers)  # before a base of a family that there is not is asked for
    missing = [key for key in ("family", "base", "data") if not getattr(answers, key)]
    if missing:
        options = " ".join(f"--{key}" for key in missing)
        raise NotAnswered(
            f"{', '.join(missing)} must be given: this is no terminal to ask on",
            f"add {options}, such as --family sana --base {_example_base(answers.family)} "
            "--data datasets/dog",
        )
    return evolve(
        answers,
        method=answers.method or "lora",
        budget=answers.budget or "auto",
        name=answers.name or _default_name(answers),
    )


def _asked(answers: Answers) -> Answers:
    """The answers, those that are missing asked for one by one."""
    from compiler.families import FAMILIES

    families = tuple(FAMILIES)
    answers = _ask(answers, "family", f"Model family ({', '.join(families)})", families[0])
    _family(answers)
    answers = _ask(answers, "base", "Base: a hub id or a folder", _example_base(answers.family))
    answers = _ask(answers, "data", "Folder of your images", "")
    if not answers.caption and not _has_captions(answers.data):
        question = "No .txt captions there. One caption for all images (empty: write them later)"
        answers = evolve(answers, caption=_prompt(question, "", show_default=False))
    answers = _ask(answers, "method", "Method (lora, full)", "lora")
    answers = _ask(
        answers, "budget", 'Device memory, such as "24 GiB" (auto: what is free)', "auto"
    )
    return _ask(answers, "name", "Name of the run", _default_name(answers))


def _ask(answers: Answers, key: str, question: str, default: str) -> Answers:
    if getattr(answers, key):
        return answers
    return evolve(answers, **{key: _prompt(question, default or None)})


def _prompt(question: str, default: str | None, *, show_default: bool = True) -> str:
    import typer

    answer = typer.prompt(question, default=default, show_default=show_default, err=True)
    return str(answer).strip()


def _checked(answers: Answers) -> None:
    """Raises NotAnswered for an answer that no recipe can hold."""
    from compiler.diagnostics import nearest
    from compiler.passes.storage import LONGEST_NAME, how_to_name, safe_name
    from compiler.units import ByteSize, UnitError

    _family(answers)
    if answers.method not in METHODS:
        guess = nearest(answers.method, METHODS)
        advice = f"did you mean `{guess}`?" if guess else "say lora or full"
        raise NotAnswered(f"unknown method `{answers.method}`", advice)
    if not safe_name(answers.name, LONGEST_NAME):
        advice = how_to_name(answers.name, LONGEST_NAME)
        raise NotAnswered(f"`{answers.name}` can't name a run", advice)
    if answers.budget not in ("auto", "none"):
        try:
            ByteSize.parse(answers.budget)
        except UnitError as error:
            raise NotAnswered(error.message, error.advice or 'such as "24 GiB"') from error


def _family(answers: Answers) -> FamilyCard:
    from compiler.diagnostics import choices, nearest
    from compiler.families import FAMILIES
    from compiler.passes.model import OTHER_NAMES

    if answers.family not in FAMILIES:
        guess = nearest(answers.family, FAMILIES, OTHER_NAMES)
        known = choices(tuple(FAMILIES), len(FAMILIES))
        advice = f"did you mean `{guess}`?" if guess else f"known: {known}"
        raise NotAnswered(f"unknown family `{answers.family}`", advice)
    return FAMILIES[answers.family]


def _example_base(family: str) -> str:
    """The base to offer: the first of its family that was made for 1024 pixels, if there is one."""
    from compiler.families import FAMILIES

    known = FAMILIES[family if family in FAMILIES else next(iter(FAMILIES))].known
    return next((one.base for one in known if one.resolution == 1024), known[0].base)


def _default_name(answers: Answers) -> str:
    return Path(answers.data).expanduser().resolve().name or "run"


def _has_captions(data: str) -> bool:
    try:
        return any(Path(data).expanduser().glob("*.txt"))
    except (OSError, ValueError, RuntimeError):
        return False


def _title(answers: Answers) -> str:
    method = "LoRA on" if answers.method == "lora" else "full fine-tune of"
    return f"{method} {_family(answers).title}"


def _model(answers: Answers, folder: Path) -> list[str]:
    base = answers.base
    if _is_here(base):
        base = _relative(base, folder)
    return ["[model]", f"family = {_quoted(answers.family)}", f"base = {_quoted(base)}", ""]


def _is_here(base: str) -> bool:
    """Whether it is a folder or a file, and no hub id."""
    try:
        return Path(base).expanduser().exists()
    except (OSError, ValueError, RuntimeError):
        return False


def _adapter(answers: Answers) -> list[str]:
    if answers.method == "full":
        return []
    sets = ", ".join(_family(answers).target_sets)
    return [
        "[adapter]                      # leave this table out for a full fine-tune",
        'kind = "lora"',
        "rank = 16                      # more learns more detail, and takes more memory",
        f'targets = "auto"               # {sets}, or patterns',
        "",
    ]


def _memory(answers: Answers) -> list[str]:
    budget = f"budget = {_quoted(answers.budget)}"
    return ["[memory]", f"{budget:<30} # what the run may use; the plan says if it fits", ""]


def _data(answers: Answers, folder: Path) -> list[str]:
    captions = f'captions = {{ from = "instance", prompt = {_quoted(answers.caption)} }}'
    if not answers.caption:
        captions = 'captions = { from = "textfile" }  # a .txt beside each image'
    return [
        "[data]",
        'resolution = "auto"            # pixels; auto: the size that the base was made for',
        "",
        "[[data.source]]",
        f"path = {_quoted(_relative(answers.data, folder))}",
        "repeats = 1                    # passes over these images in an epoch",
        captions,
        "",
    ]


def _train(answers: Answers) -> list[str]:
    rate = RATES[answers.method]
    return [
        "[train]",
        "epochs = 20                    # or steps = 2000: one of the two",
        "batch_size = 1",
        f"accumulate = {4 if _many(answers.data) else 1}                 # batches in one update",
        f'optimizer = {{ name = "adamw", lr = {rate} }}',
        'schedule = { name = "cosine", warmup = "5%" }',
        "",
        "[checkpoints]",
        'every = "1 epoch"',
        "keep = 3",
        "",
    ]


def _many(data: str) -> bool:
    """Whether an epoch over a folder holds several updates of four images."""
    from compiler.data.headers import SUFFIXES

    try:
        files = (
            one for one in Path(data).expanduser().rglob("*") if one.suffix.lower() in SUFFIXES
        )
        return len(list(islice(files, SOME))) == SOME
    except (OSError, ValueError, RuntimeError):
        return True


def _validation(answers: Answers) -> list[str]:
    prompt = _quoted(answers.caption or "what you want to see")
    refines = _family(answers).refines > 0
    mark = "" if answers.caption and not refines else "# "
    return [
        f"{mark}[validation]                   # pictures drawn while it trains",
        f'{mark}every = "1 epoch"',
        f"{mark}prompts = {{ first = {prompt} }}",
        *(['# picture = "photo.png"        # what is refined'] if refines else []),
    ]


def _relative(place: str, folder: Path) -> str:
    """A path given from here, as seen from the recipe's folder."""
    path = Path(place).expanduser()
    if path.is_absolute():
        return place
    try:
        return os.path.relpath(path.resolve(), folder).replace(os.sep, "/")
    except ValueError:  # another drive on Windows
        return str(path.resolve())


def _quoted(text: str) -> str:
    """A TOML string."""
    import tomli_w

    return tomli_w.dumps({"x": text}).removeprefix("x = ").rstrip("\n")


def _write(path: Path, text: str) -> None:
    with path.open("x", encoding="utf-8", newline="\n") as file:
        file.write(text)
