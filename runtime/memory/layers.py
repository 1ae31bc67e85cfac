"""An encoder of many equal layers, from few of them: see `runtime.memory.repeat`."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

from attrs import evolve
from torch import nn

from compiler.memory import Candidate
from runtime.families.base import Family
from runtime.families.common import component_of
from runtime.memory.curve import NotAlike
from runtime.memory.phases import META, run_text
from runtime.memory.repeat import More, Run, repeated
from runtime.memory.tracker import Tracker

LAYERS = {
    "CLIPTextModel": "num_hidden_layers",
    "CLIPTextModelWithProjection": "num_hidden_layers",
    "T5EncoderModel": "num_layers",
}
"""Encoders whose layers are equal: what their configuration calls how many there are."""
FEW = 6
"""The first and the last two, which may differ from others, and two that are compared."""
KINDS = {0: "first", 1: "second", 2: "inner", 3: "inner", 4: "last but one", 5: "last"}


def run_few(candidate: Candidate, family: Family, encoder: str, tracker: Tracker) -> dict[str, int]:
    """As `run_text`, on meta tensors. Raises NotAlike for an encoder that it does not know, and
    where the most is needed after the layers: when what they leave is freed is not known."""
    model = candidate.model
    config = json.loads(model.configs[encoder])
    name = LAYERS.get(component_of(model, encoder).class_name, "")
    count = config.get(name, 0)
    if count <= FEW:
        raise NotAlike("no equal layers")
    short = {**model.configs, encoder: json.dumps({**config, name: FEW})}
    held: dict[str, int] = {}

    def look(module: nn.Module) -> None:
        layers = list(_layers(module))
        for number, layer in enumerate(layers):
            layer.register_forward_pre_hook(partial(_begin, tracker, number))
        layers[-1].register_forward_hook(partial(_begin, tracker, FEW))
        for category, nbytes in tracker.held(
            [*layers[2].parameters(), *layers[2].buffers()]
        ).items():
            held[category] = nbytes * (count - FEW)

    run_text(
        evolve(candidate, model=evolve(model, configs=short)), family, encoder, META, tracker, look
    )
    (curve,) = tracker.curves()
    run = Run(kinds=KINDS, order=(0, 1, *[2] * (count - FEW + 1), 3, 4, 5))
    (deep,), _ = repeated([curve], [run], More(live=held, host=0))
    after = len(curve.sizes) - int(curve.starts[-1])
    if deep.live.sum(axis=1).argmax() >= len(deep.sizes) - after:
        raise NotAlike("most is needed after the layers")
    return deep.at_peak()


def _layers(module: nn.Module) -> nn.ModuleList:
    """Raises NotAlike if it is not certain which they are."""
    lists = [each for each in module.modules() if isinstance(each, nn.ModuleList)]
    found = [each for each in lists if len(each) == FEW]
    if len(found) != 1:
        raise NotAlike("it is not certain which its layers are")
    return found[0]


def _begin(tracker: Tracker, number: int, *_: Any) -> None:
    tracker.step(number, False, 0)
