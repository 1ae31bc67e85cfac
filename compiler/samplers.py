"""Samplers that validation pictures can be drawn with, besides the base's own."""

from __future__ import annotations

from attrs import frozen


@frozen(kw_only=True)
class Sampler:
    """Classes of Diffusers; "" where there is none."""

    flow: str  # for models that match a flow
    table: str  # for models that are trained on a table of noise levels
    by_size: bool = True  # can shift the noise levels by a picture's size


SAMPLERS = {
    "euler": Sampler(flow="FlowMatchEulerDiscreteScheduler", table="EulerDiscreteScheduler"),
    "euler-ancestral": Sampler(flow="", table="EulerAncestralDiscreteScheduler"),
    "heun": Sampler(
        flow="FlowMatchHeunDiscreteScheduler", table="HeunDiscreteScheduler", by_size=False
    ),
    "ddim": Sampler(flow="", table="DDIMScheduler"),
    "dpm++": Sampler(flow="DPMSolverMultistepScheduler", table="DPMSolverMultistepScheduler"),
    "unipc": Sampler(flow="UniPCMultistepScheduler", table="UniPCMultistepScheduler"),
}
