"""The plan in the making: what the passes read and fill in."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from attrs import Factory, define

from compiler import plan
from compiler.data.manifest import Manifest
from compiler.data.scan import Index
from compiler.data.sources.remote import DOWNLOADS, Remote
from compiler.data.sources.streams import Unlisted
from compiler.diagnostics import Diagnostic, Severity
from compiler.families.card import FamilyCard, KnownModel
from compiler.machine import Machine
from compiler.memory import MemoryModel
from compiler.schema import ComponentRecipe, Recipe
from compiler.site import Site
from compiler.source import Merged, Part, dotted
from compiler.spans import KeyPath

_NOTHING = object()
_LONG = re.compile(r"(?<=`)[^`\n]{121,}(?=`)|(?<=')[^'\n]{241,}(?=')")
"""A quotation in a message that is too long to be read."""


@define(kw_only=True)
class ModelFacts:
    """What is known of the base before anything is loaded."""

    family: FamilyCard
    base: str
    local: bool
    revision: str
    configs: dict[str, dict[str, Any]]
    parameters: dict[str, int]
    known: KnownModel | None
    index: dict[str, Any] = Factory(dict)  # of a folder: what its model_index.json says
    file: str = ""  # a whole model in one file; `base` then is where the rest comes from
    held: tuple[str, ...] = ()  # the components in it

    @property
    def prompt_length(self) -> int:
        """Tokens of the longest encoder, as one samples with this base."""
        own = self.known.prompt_length if self.known else None
        return self.family.prompt_length if own is None else own

    @property
    def few_steps(self) -> bool:
        """Whether it was distilled into a few steps; its pipeline ignores the guidance scale."""
        return bool(self.family.few_steps_key and self.index.get(self.family.few_steps_key))

    @property
    def distilled(self) -> KnownModel | None:
        """The published few-step model that it is, if it is one. A folder is told by all that its
        index and its configurations say; what also an undistilled model says tells nothing."""
        alike = [self.known] if self.known else [k for k in self.family.known if self._is_like(k)]
        return alike[0] if alike and all(known.undistilled for known in alike) else None

    def _is_like(self, known: KnownModel) -> bool:
        """Whether the folder says all that is known of a published model; it may say more, as
        Diffusers adds defaults."""
        stated = [(known.index, dict.fromkeys(known.index, False) | self.index)]
        for name in (self.family.trained_component, "scheduler"):
            stated.append((known.configs[name], self.configs[name]))
        return all(
            key in found and found[key] == value
            for wanted, found in stated
            for key, value in wanted.items()
        )

    @property
    def guidance(self) -> float:
        """The guidance scale that one samples with; 1: none."""
        if self.few_steps:
            return 1.0
        known = self.known or self.distilled
        own = known.guidance if known else None
        return self.family.guidance if own is None else own

    @property
    def inference_steps(self) -> int:
        """The steps that one samples with."""
        if self.few_steps:
            return self.family.few_steps
        known = self.known or self.distilled
        own = known.inference_steps if known else None
        return self.family.inference_steps if own is None else own

    @property
    def native_resolution(self) -> int:
        """Pixels it was made for: as the card states, else sample size times VAE factor."""
        if self.known is not None:
            return self.known.resolution
        size = self.configs[self.family.trained_component].get("sample_size")
        if isinstance(size, int):
            return size * self.family.vae_factor(self.configs["vae"])
        return self.family.default_resolution


@define(kw_only=True)
class Draft:
    """One compilation. Passes run in the order of `compiler.passes.PASSES` and fill in the rest."""

    recipe: Recipe
    located: Merged
    folder: Path  # of the recipe; relative paths start here
    cache_default: Path
    machine: Machine
    memory_model: MemoryModel | None
    index: Index | None
    site: Site | Callable[[], Site] | None = None  # this machine's disks and its past
    train_below: int = 0  # bytes: most for training, of a budget that allows more; 0: the budget
    running: str = ""  # name of the pass that runs now
    diagnostics: list[Diagnostic] = Factory(list)
    decisions: list[plan.Decision] = Factory(list)

    model: ModelFacts | None = None
    device: plan.Device = "cpu"
    adapter: plan.Adapter | None = None
    precision: plan.Precision | None = None
    speed: plan.Speed = Factory(plan.Speed)
    formats: dict[str, plan.Dtype] = Factory(dict)  # of each component's weights
    quantize: dict[str, plan.Quantisation] = Factory(dict)  # of each component
    quantize_on: dict[str, Literal["cpu", "device"]] = Factory(dict)
    files: dict[str, str] = Factory(dict)  # weights that are not the base's
    text: plan.Text | None = None
    entangled: set[int] = Factory(set)  # sources in which something would be written: never read
    copies: list[Remote] = Factory(list)  # sources that lie elsewhere, and whose copy is here
    remotes: list[Remote] = Factory(list)  # sources that are not copied here yet
    absent: list[str] = Factory(list)  # URLs of pictures that are not
    later: list[str] = Factory(list)  # those that nobody gave, and that the plan does without
    fetched: list[str] = Factory(list)  # URLs of pictures whose copies are here
    unlisted: list[Unlisted] = Factory(list)  # streamed containers nobody has looked into yet
    sources: tuple[plan.DataSource, ...] = ()
    manifest: Manifest | None = None
    evaluation: plan.Evaluation | None = None
    skips: list[tuple[int, tuple[str, ...], str]] = Factory(list)  # (source's number, names, why)
    hidden: list[tuple[str, int, tuple[str, ...]]] = Factory(list)  # (source, count, some names)
    batch_sizes: tuple[int, ...] = ()  # of each of `sources`
    buckets: tuple[plan.Bucket, ...] = ()
    steps: plan.Steps | None = None
    sharing: plan.Sharing = Factory(plan.Sharing)
    optimizer: plan.Optimizer | None = None
    schedule: plan.Schedule | None = None
    objective: plan.Objective | None = None
    sprint: plan.Sprint | None = None
    text_training: plan.TextTraining | None = None
    embeddings: plan.Embeddings | None = None
    ema: plan.Ema | None = None
    checkpoints: plan.Checkpoints | None = None
    validation: plan.Validation | None = None
    clip_bytes: int = 0  # on the host, of what gives pictures their CLIP score
    publish: plan.Publish | None = None
    memory: plan.Memory | None = None
    run_folder: str = ""
    cache_folder: str = ""
    workers: int = 1
    threads: int = 1

    @property
    def trained(self) -> ComponentRecipe:
        """What the recipe says of the component that is trained; there must be a model."""
        assert self.model is not None
        said: ComponentRecipe = getattr(self.recipe.model, self.model.family.trained_component)
        return said

    @property
    def downloads(self) -> Path:
        """The folder of copies of what is remote."""
        return self.cache_default / DOWNLOADS

    def report(
        self,
        severity: Severity,
        code: str,
        path: KeyPath,
        message: str,
        *,
        label: str = "",
        help: str = "",
        of: Part = "value",
        notes: tuple[str, ...] = (),
    ) -> None:
        """Add a diagnostic that blames the key at `path`."""
        span = self.located.span(path, of)
        self.diagnostics.append(
            Diagnostic(
                code=code,
                severity=severity,
                message=_LONG.sub(_clipped, message),
                span=span,
                label=label,
                help=help,
                path=dotted(path),
                notes=notes,
            )
        )

    def error(self, code: str, path: KeyPath, message: str, **rest: Any) -> None:
        """Something that the recipe must say otherwise."""
        self.report("error", code, path, message, **rest)

    def warn(self, code: str, path: KeyPath, message: str, **rest: Any) -> None:
        """Something unwise, or a setting without effect."""
        self.report("warning", code, path, message, **rest)

    def given(self, path: KeyPath) -> bool:
        """Whether the recipe (or an override) itself states the value at `path`."""
        return self._at(path) is not _NOTHING

    def decide(self, path: KeyPath, value: object, *, by: str = "default", why: str = "") -> None:
        """Record a resolved value; `by` and `why` hold where the recipe leaves it open. `by`
        "decided" names the pass that runs."""
        open_ = self._at(path) in (_NOTHING, "auto")
        by = f"pass {self.running}" if by == "decided" else by
        source = by if open_ else self.located.where(path)
        made = plan.Decision(
            key=dotted(path), value=spelt(value), source=source, why=why if open_ else ""
        )
        if made not in self.decisions:  # several sources may take one default
            self.decisions.append(made)

    def _at(self, path: KeyPath) -> object:
        node: Any = self.located.data
        for part in path:
            if isinstance(node, list):
                inside = isinstance(part, int) and part < len(node)
            else:
                inside = isinstance(node, dict) and part in node
            if not inside:
                return _NOTHING
            node = node[part]
        return node


def _clipped(quoted: re.Match[str]) -> str:
    return f"{quoted[0][:60]}...{quoted[0][-30:]}"


def spelt(value: object) -> str:
    """A resolved value as the recipe would spell it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, tuple | list):
        return ", ".join(spelt(item) for item in value)
    return str(value)
