"""What other trainers call the optimizers."""

from __future__ import annotations

from collections.abc import Container

_ELSEWHERE = {
    "ao-adamw8bit": "adamw-8bit",
    "ao-adamw4bit": "adamw-4bit",
    "ao-adamfp8": "adam-fp8",
    "ao-adamwfp8": "adamw-fp8",
    "adamw8bit": "adamw-8bit",
    "adamw4bit": "adamw-4bit",
    "adamwfp8": "adamw-fp8",
    "adam8bit": "adam-8bit",
    "8bitadam": "adam-8bit",
    "8bitadamw": "adamw-8bit",
    "pagedadamw": "bnb-adamw-paged",
    "pagedadamw32bit": "bnb-adamw-paged",
    "pagedadamw8bit": "bnb-adamw-8bit-paged",
    "lion8bit": "bnb-lion-8bit",
    "pagedlion8bit": "bnb-lion-8bit-paged",
    "adagrad8bit": "bnb-adagrad-8bit",
    "ademamix8bit": "bnb-ademamix-8bit",
    "bnb-adamw32bit": "bnb-adamw",
    "adamwbf16": "adamw-bf16",
    "cpu-offload": "adamw-offload",
    "deepspeed-adamw": "adamw-offload",
    "schedulefree": "adamw-schedulefree",
    "adamwschedulefree": "adamw-schedulefree",
    "schedulefreeadamw": "adamw-schedulefree",
    "radamschedulefree": "radam-schedulefree",
    "optimi-stableadamw": "stableadamw",
    "optimi-lion": "lion",
    "optimi-ranger": "ranger",
    "optimi-adan": "adan",
    "sgdnesterov": "sgd",
    "prodigyopt": "prodigy",
    "dadaptation": "prodigy",
    "dadaptadam": "prodigy",
}


def called_here(name: str, known: Container[str]) -> str:
    """What the optimizer that another trainer calls `name` is called here; "" if it is unknown.

    Case, underlines and hyphens don't matter, nor does what follows a `+`.
    """
    base = name.lower().partition("+")[0].replace("_", "-").strip("- ")
    spellings = [base, base.replace("8bit", "-8bit"), base.rpartition(".")[2]]
    spellings += [text.replace("--", "-") for text in spellings]
    found = next((text for text in spellings if text in known), "")
    short = base.replace("-", "")
    theirs = {key.replace("-", ""): value for key, value in _ELSEWHERE.items()}
    return found or theirs.get(short, "")
