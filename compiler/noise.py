"""The table of noise levels: T entries, as the schedulers have them at inference. T is 1000, or
what the model's own table has.

s_i = (T - i) / T, sigma_i = shift s_i / (1 + (shift - 1) s_i), i from 0 (pure noise) to T - 1.
Where a model predicts the noise or v, the shift is 1 and entry i is timestep t = T - 1 - i.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from compiler.families.card import FamilyCard
from compiler.plan import NoiseTable, Objective, ShiftRule

TIMESTEPS = 1000
MOST_MU = 700.0  # e to the power of a little more is no number
_NEAR = 1e-9  # a bound that is meant to be an entry may be written rounded


FLOWS = ("FlowMatch", "SCM")
"""What Diffusers' schedulers are called, at the start, that do nothing but follow a flow. Others
have to be told so. (The second is Sana Sprint's, of few steps.)"""
NO_BETAS = ("FlowMatch", "EDM")
"""And those without a table of betas. Those of EDM (arXiv 2206.00364) also scale what goes into a
model by its noise level: models such as Playground 2.5 are trained for that."""
ZERO_SNR = (
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "LCMScheduler",
    "TCDScheduler",
    "UniPCMultistepScheduler",
)
"""Diffusers' schedulers that know `rescale_betas_zero_snr`."""
SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")


def noise_table(family: FamilyCard, scheduler: Mapping[str, Any]) -> NoiseTable | None:
    """The table of betas that a scheduler's configuration states, DDPMScheduler's defaults where it
    says nothing; None for flow matching. Raises ValueError for one that we don't know."""
    if family.prediction == "flow":
        return None
    schedule = scheduler.get("beta_schedule", "linear")
    if schedule not in SCHEDULES:
        raise ValueError(f"the scheduler has betas of kind `{schedule}`")
    if scheduler.get("trained_betas") is not None:
        raise ValueError("the scheduler lists its betas one by one")
    if int(scheduler.get("num_train_timesteps", TIMESTEPS)) != family.timesteps:
        raise ValueError(f"the scheduler has not {family.timesteps} timesteps")
    start, end = (float(scheduler.get(f"beta_{k}", v)) for k, v in (("start", 1e-4), ("end", 0.02)))
    if not 0 < start <= end < 1:
        raise ValueError("the scheduler's betas are out of range")
    return NoiseTable(
        schedule=schedule,
        beta_start=start,
        beta_end=end,
        zero_terminal_snr=bool(scheduler.get("rescale_betas_zero_snr", False)),
        timesteps=family.timesteps,
    )


def knows_zero_snr(scheduler: Mapping[str, Any]) -> bool:
    """Whether this scheduler can begin at pure noise."""
    return scheduler.get("_class_name") in ZERO_SNR


def sampled_so(scheduler: Mapping[str, Any], table: NoiseTable | None) -> dict[str, Any]:
    """A scheduler's configuration for a model that was trained on `table`. Where this ends in pure
    noise, steps have to begin there (arXiv 2305.08891, sections 3.1 and 3.3)."""
    found, key = dict(scheduler), "rescale_betas_zero_snr"
    if table is None or not knows_zero_snr(scheduler):
        return found
    if bool(found.get(key, False)) != table.zero_terminal_snr:
        found[key] = table.zero_terminal_snr
        if table.zero_terminal_snr:
            found["timestep_spacing"] = "trailing"
    return found


def predicted(family: FamilyCard, scheduler: Mapping[str, Any]) -> Literal["flow", "epsilon", "v"]:
    """What the model predicts. Raises ValueError for what we can't train."""
    kind, said = str(scheduler.get("_class_name", "")), scheduler.get("prediction_type", "epsilon")
    if family.prediction == "flow":
        flows = said == "flow_prediction" or bool(scheduler.get("use_flow_sigmas"))
        if kind and not flows and not kind.startswith(FLOWS):
            raise ValueError(f"its scheduler, {kind}, does not say that the model matches a flow")
        return "flow"
    if kind.startswith(NO_BETAS) or scheduler.get("timestep_type") == "continuous":
        raise ValueError(f"the noise levels of its scheduler, {kind}, are no table of betas")
    if said == "epsilon":
        return "epsilon"
    if said == "v_prediction":
        return "v"
    raise ValueError(f"the scheduler says that the model predicts `{said}`")


def entries_of(objective: Objective) -> int:
    """T, the number of noise levels."""
    return TIMESTEPS if objective.table is None else objective.table.timesteps


def level(index: int, shift: float, entries: int = TIMESTEPS) -> float:
    """sigma of one entry of so many, in (0, 1]."""
    unshifted = (entries - index) / entries
    return shift * unshifted / (1 + (shift - 1) * unshifted)


def shift_of_tokens(rule: ShiftRule, tokens: int) -> float:
    """The shift for a picture of so many tokens.

    mu is linear in the tokens: `base_shift` at `base_tokens`, `max_shift` at `max_tokens`, and so
    on beyond both, up to where the rule has another line. The shift is e^mu, or mu itself where the
    rule is "linear": `time_shift` of Diffusers' FlowMatchEulerDiscreteScheduler, e^mu / (e^mu + 1 /
    s - 1), is the table's formula with shift e^mu. The idea is section 5.3.2 of arXiv 2403.03206
    (more pixels need more noise).
    """
    slope = (rule.max_shift - rule.base_shift) / (rule.max_tokens - rule.base_tokens)
    mu = rule.base_shift + slope * (tokens - rule.base_tokens)
    if rule.far is not None and tokens > rule.far.tokens:
        mu = rule.far.start + rule.far.slope * tokens
    if rule.kind == "linear":
        return mu
    return math.exp(mu) if mu < MOST_MU else math.inf


def shift_of(objective: Objective, height: int, width: int) -> float:
    """The shift for latents of this size."""
    rule = objective.shift_by_size
    if rule is None:
        return objective.shift
    return shift_of_tokens(rule, (height // rule.patch) * (width // rule.patch))


def trained_entries(objective: Objective, shift: float) -> tuple[int, int] | None:
    """First and last entry with min_sigma <= sigma <= max_sigma; None if there is none."""
    low, high = objective.min_sigma - _NEAR, objective.max_sigma + _NEAR
    entries = entries_of(objective)
    inside = [i for i in range(entries) if low <= level(i, shift, entries) <= high]
    return (inside[0], inside[-1]) if inside else None
