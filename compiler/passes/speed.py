"""What makes steps faster and alters last bits: compiled blocks, kernels of attention, TF32."""

from __future__ import annotations

from typing import Literal

from compiler import plan
from compiler.attention import KERNELS, AttentionFacts
from compiler.diagnostics import choices
from compiler.draft import Draft
from compiler.machine import COMPILER, TRITON
from compiler.passes.projections import resolve_projections
from compiler.shapes import pass_shapes
from compiler.spans import KeyPath

COMPILE: KeyPath = ("speed", "compile")
ATTENTION: KeyPath = ("speed", "attention")
TF32: KeyPath = ("speed", "tf32")
CHANNELS_LAST: KeyPath = ("speed", "channels_last")
COMPILES = ("cpu", "cuda")  # devices that torch.compile writes kernels for
TF32_CAPABILITY = 8.0
GRAPH_SECONDS = 15
"""To compile forward and backward pass of one block for one shape: 11 to 17 seconds with two
processor cores, measured on small blocks of Sana and SD3."""
KINDS = (
    3  # of blocks that differ for the compiler: the first one, those in the middle, the last one
)


def resolve_speed(draft: Draft) -> None:
    """Fill in `draft.speed`."""
    if draft.model is None or draft.precision is None:
        return
    compiled = _compile(draft)
    family = draft.model.family
    pads = compiled != "off" and family.unpadded_text and draft.text is not None
    draft.speed = plan.Speed(
        compile=compiled,
        attention=_attention(draft),
        tf32=_tf32(draft),
        channels_last=_channels_last(draft),
        fused_projections=resolve_projections(draft),
        tokens=draft.text.max_length if pads and draft.text else 0,
    )


def _compile(draft: Draft) -> Literal["off", "regional"]:
    asked = draft.recipe.speed.compile
    chosen: Literal["off", "regional"] = "off" if asked == "auto" else asked
    if draft.device not in COMPILES:
        why = f"torch.compile is not ready for {draft.device}"
    else:
        why = f"{_outlay(draft)}, which only a long run wins back"
    draft.decide(COMPILE, chosen, by="decided", why=why)
    if chosen == "off":
        return chosen
    if draft.device not in COMPILES:
        draft.error("conflict", COMPILE, why, help='say "off"')
    family = draft.model.family if draft.model else None
    if family is not None and family.not_compiled:
        message = f"blocks of {family.title} can't be compiled: {family.not_compiled}"
        draft.error("conflict", COMPILE, message, help='say "off"')
    if draft.device == draft.machine.device:
        _judge_tools(draft)
    return chosen


def _outlay(draft: Draft) -> str:
    shapes = len(pass_shapes(draft.buckets)) or 1
    seconds = shapes * KINDS * GRAPH_SECONDS
    many = "one shape" if shapes == 1 else f"{shapes} shapes"
    return f"compiling for {many} would take about {max(1, round(seconds / 60))} min"


def _judge_tools(draft: Draft) -> None:
    """What torch.compile needs on this machine."""
    cuda, missing = draft.device == "cuda", draft.machine.missing
    if cuda and TRITON in missing:
        draft.warn(
            "missing-package",
            COMPILE,
            "torch.compile needs the package triton, which is not installed here",
            help="pip install triton",
        )
    elif COMPILER in missing:
        draft.warn(
            "missing-package",
            COMPILE,
            "torch.compile needs a C++ compiler, and there is none here",
            help="install g++ or clang, or set CXX to its path",
        )


def _attention(draft: Draft) -> plan.AttentionKernel:
    assert draft.model is not None
    asked = draft.recipe.speed.attention
    if asked == "auto":
        why = f"PyTorch takes the fastest of its own; of {draft.model.family.attention}"
        draft.decide(ATTENTION, "native", by="decided", why=why)
        return "native"
    draft.decide(ATTENTION, asked)
    row = KERNELS[asked]
    reason = unfit(draft, row)
    if reason:
        draft.error(
            "attention-unfit",
            ATTENTION,
            f"attention `{asked}` {reason}",
            help=f"these can: {choices([k for k, r in KERNELS.items() if not unfit(draft, r)])}",
        )
    elif row.package in draft.machine.missing and draft.device == draft.machine.device:
        draft.warn(
            "missing-package",
            ATTENTION,
            f"attention `{asked}` needs the package {row.package}, which is not installed here",
            help=f"pip install {row.package}",
        )
    return asked


def unfit(draft: Draft, row: AttentionFacts) -> str:
    """Why the draft's model can't be trained with the kernel; "" if it can."""
    assert draft.model is not None and draft.precision is not None
    family, compute = draft.model.family, draft.precision.compute
    here = draft.machine.capability if draft.device == draft.machine.device == "cuda" else ""
    if not row.backward:
        return "has no backward pass: it draws pictures, and can't train"
    if draft.device not in row.devices:
        return f"does not run on {draft.device}"
    if here and float(here) < row.capability:
        return f"needs compute capability {row.capability:g}, and this device has {here}"
    if here and compute == "bfloat16" and float(here) < row.bf16_capability:
        needed = f"{row.bf16_capability:g}"
        return f"computes bfloat16 from compute capability {needed} on, and this device has {here}"
    if compute not in row.formats:
        return f"computes {choices(row.formats)}, not {compute}"
    if family.masked_attention and not row.masks:
        return f"takes no mask, and {family.title} masks the padding of prompts"
    return ""


def _channels_last(draft: Draft) -> bool:
    assert draft.model is not None
    family, asked = draft.model.family, draft.recipe.speed.channels_last
    draft.decide(CHANNELS_LAST, asked)
    if asked and family.trained_component != "unet":
        draft.error(
            "no-effect",
            CHANNELS_LAST,
            f"the {family.trained_component} of {family.title} has no convolution that it would "
            "make faster",
            help="leave `channels_last` out",
        )
    return asked


def _tf32(draft: Draft) -> bool:
    asked = draft.recipe.speed.tf32
    draft.decide(TF32, asked)
    if not asked:
        return False
    machine = draft.machine
    old = machine.device == "cuda" and float(machine.capability or 0) < TF32_CAPABILITY
    if draft.device != "cuda" or old:
        where = f"{machine.device_name} has none" if draft.device == "cuda" else "CUDA alone has it"
        draft.error(
            "no-effect", TF32, f"TF32 has no effect on {draft.device}: {where}", help="leave it out"
        )
    return asked
