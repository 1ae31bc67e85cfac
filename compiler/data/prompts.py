"""The prompts that a run encodes."""

from __future__ import annotations

from collections.abc import Iterator

from attrs import frozen

from compiler.data.manifest import Manifest
from compiler.plan import Plan


@frozen(slots=True)
class Prompt:
    """One text to encode, in one of the pipeline's two ways."""

    text: str
    negative: bool


def every_prompt(plan: Plan, manifest: Manifest) -> Iterator[Prompt]:
    """The prompts that a run needs: captions, dropout, validation, and what a teacher is guided
    away from. Some may come twice."""
    for text in manifest.texts:
        yield Prompt(text, False)
    for text in manifest.held_out.texts if manifest.held_out else ():
        yield Prompt(text, False)
    if plan.sprint or any(source.captions.dropout > 0 for source in plan.sources):
        yield Prompt("", True)
    for prompt in plan.validation.prompts:
        yield Prompt(prompt.text, False)
    if plan.validation.prompts:
        yield Prompt(plan.validation.negative, True)


def prompts_of(plan: Plan, manifest: Manifest) -> list[Prompt]:
    """Each distinct prompt that a run needs."""
    return list(dict.fromkeys(every_prompt(plan, manifest)))
