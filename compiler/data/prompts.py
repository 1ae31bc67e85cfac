"""The prompts that a run encodes."""

from __future__ import annotations

from attrs import frozen

from compiler.data.manifest import Manifest
from compiler.plan import Plan


@frozen
class Prompt:
    """One text to encode, in one of the pipeline's two ways."""

    text: str
    negative: bool


def prompts_of(plan: Plan, manifest: Manifest) -> list[Prompt]:
    """Each distinct prompt that a run needs: captions, dropout, validation,
    and what a teacher is guided away from."""
    held_out = manifest.held_out.captions if manifest.held_out else ()
    wanted = [Prompt(text, False) for text in (*manifest.captions, *held_out)]
    if plan.sprint or any(source.captions.dropout > 0 for source in plan.sources):
        wanted.append(Prompt("", True))
    if plan.validation.prompts:
        wanted += [Prompt(prompt.text, False) for prompt in plan.validation.prompts]
        wanted.append(Prompt(plan.validation.negative, True))
    return list(dict.fromkeys(wanted))
