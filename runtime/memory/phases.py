"""What the phases around the training step allocate: encoding prompts and pictures, drawing.

Each function runs the runtime's own code under a tracker, on meta tensors or on real ones.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from compiler.memory import Candidate
from compiler.plan import Component, Model, Precision, Text
from runtime import examples
from runtime.families import sana_sprint
from runtime.families.base import PICTURE, Family
from runtime.families.common import DTYPES, class_called, component_of, draw, inference
from runtime.memory.pretend import masks_kept
from runtime.memory.tracker import Tracker
from runtime.quantise.layers import most_beside
from runtime.samplers import sampler
from runtime.step import forward_losses
from runtime.text_training import TrainedText, example_tokens

CHARACTERS = 4  # of English text in one token, about; for the length of an instruction
PROMPT = "a prompt"
META, HOST = torch.device("meta"), torch.device("cpu")


class Tokens:
    """In a tokenizer's place: as many tokens as the prompt may have."""

    model_max_length = 77  # CLIP's
    padding_side = "right"

    def __init__(self, device: torch.device, names: Sequence[str]):
        """`names` of what the real one makes of a prompt."""
        self.device = device
        self.names = names
        self.pads = False  # whether it was asked to pad short prompts

    def __call__(
        self, prompts: list[str] | str, *, padding: str | bool, max_length: int = 1, **rest: Any
    ) -> Any:
        """Token numbers, mask and places, (prompts, tokens); one token without padding to a
        length. Cut to a length (`padding` True), a prompt may be as long."""
        from transformers import BatchEncoding

        count = 1 if isinstance(prompts, str) else len(prompts)
        shape = (count, max_length if padding in ("max_length", True) else 1)
        self.pads = self.pads or padding == "max_length"
        ones = torch.ones(shape, dtype=torch.int64, device=self.device)
        return BatchEncoding({name: ones.clone() for name in self.names})

    def apply_chat_template(
        self, messages: Sequence[Any], *, tokenize: bool = True, **rest: Any
    ) -> Any:
        """A conversation as text, or several as token numbers."""
        return self([PROMPT] * len(messages), **rest) if tokenize else PROMPT

    @property
    def added_tokens_encoder(self) -> dict[str, int]:
        """None was added."""
        return {}

    def tokenize(self, text: str) -> list[str]:
        """Pieces of `text`, of which none is an embedding that was learned."""
        return text.split()

    def encode(self, text: str) -> list[int]:
        """About as many numbers as `text` has tokens."""
        return [1] * (len(text) // CHARACTERS)


def run_text(
    candidate: Candidate,
    family: Family,
    encoder: str,
    device: torch.device,
    tracker: Tracker,
    look: Callable[[nn.Module], None] = lambda _: None,
) -> dict[str, int]:
    """Bytes by category when one prompt is encoded by `encoder`, which `look` is given before."""
    with tracker:
        module = _component(candidate, family, encoder, device, tracker)
        look(module)
        tokens = all_tokens(family, device)
        tracker.category = "activations"
        tracker.reset_peak()
        stated = component_of(candidate.model, encoder)
        if beside := while_quantised(stated, module, DTYPES[stated.dtype]):
            tracker.workspace(beside)
        with masks_kept(lambda: any(each.pads for each in tokens.values())):
            family.encode_with(encoder, {encoder: module, **tokens}, [PROMPT], candidate.text)
    return tracker.breakdown()


def all_tokens(family: Family, device: torch.device) -> dict[str, Tokens]:
    """What stands in for the family's tokenizers, by their names."""
    return {
        name: Tokens(device, class_called(stated, family.card)[0].model_input_names)
        for name, stated in family.card.components.items()
        if name.startswith("tokenizer")
    }


def run_latents(
    candidate: Candidate,
    family: Family,
    size: tuple[int, int],
    device: torch.device,
    tracker: Tracker,
    count: int = 1,
) -> dict[str, int]:
    """Bytes by category when `count` pictures of `size` (width, height) are encoded together."""
    width, height = size
    with tracker:
        vae = _component(candidate, family, "vae", device, tracker)
        tracker.category = "activations"
        tracker.reset_peak()
        family.encode_pixels(vae, torch.zeros(count, 3, height, width, device=device))
    return tracker.breakdown()


def run_evaluation(
    candidate: Candidate,
    family: Family,
    model: nn.Module,
    shape: tuple[int, int, int],
    device: torch.device,
    tracker: Tracker,
    words: TrainedText | None = None,
) -> None:
    """The loss of one batch of held-out pictures, `tracker` being entered: no gradients."""
    tracker.category = "batch"
    batch = examples.held_out(examples.of_candidate(candidate), family, shape, device)
    tracker.category = "activations"
    tracker.reset_peak()
    with inference(model), words.inference() if words else nullcontext():
        forward_losses(family, model, batch, candidate.objective, candidate.precision, words)


def run_pictures(
    candidate: Candidate,
    family: Family,
    model: nn.Module,
    device: torch.device,
    tracker: Tracker,
    words: TrainedText | None = None,
) -> dict[str, int]:
    """Bytes by category when the largest validation picture is drawn, `tracker` being entered.

    The model and what training keeps on the device are there already; the VAE comes for the time
    of drawing. One sampling step is like the other.
    """
    if candidate.sprint is not None:
        family = sana_sprint.FAMILY
    vae = _component(candidate, family, "vae", device, tracker)
    with tracker.elsewhere():  # its tables
        scheduler = scheduler_of(candidate)
    parts = {candidate.model.trained_component: model, "vae": vae, "scheduler": scheduler}
    host = META if device == META else HOST
    embedding = example_embedding(
        candidate.model, family, candidate.text, candidate.precision, host
    )
    tracker.exclude(embedding.values())
    tracker.category = "activations"
    tracker.reset_peak()
    if words is not None:
        one = example_tokens(candidate.model, tuple(words.encoders), 1, device)
        embedding = words.renewed(one, embedding)
        tracker.exclude(embedding.values())
    refines = family.card.refines
    for width, height in largest(candidate.pictures):
        if refines:
            parts[PICTURE] = torch.zeros(1, 3, height, width, device=host)
            tracker.exclude([parts[PICTURE]])
        draw(
            family,
            parts,
            embedding,
            embedding,
            width=width,
            height=height,
            guidance=candidate.guidance,
            steps=math.ceil(2 / refines) if refines else 2,
            seed=0,
        )
    return tracker.breakdown()


def largest(sizes: tuple[tuple[int, int], ...]) -> list[tuple[int, int]]:
    """Those of the sizes with the most pixels."""
    most = max(width * height for width, height in sizes)
    return [size for size in dict.fromkeys(sizes) if size[0] * size[1] == most]


def fullest(shapes: Iterable[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Those of the batches (width, height, count) whose encoding may need the most memory.

    Larger or more pictures never need less, so what is less than another in one of the two and no
    more in the other is out. Which of the rest needs most depends on the VAE.
    """
    found, most = list(dict.fromkeys(shapes)), dict[int, int]()
    for width, height, count in found:
        most[count] = max(most.get(count, 0), width * height)
    return [
        (width, height, count)
        for width, height, count in found
        if not any(
            area > width * height if other == count else area >= width * height
            for other, area in most.items()
            if other >= count
        )
    ]


def scheduler_of(candidate: Candidate) -> Any:
    """What samples: the base's scheduler or a distilled model's, which does not look up on the
    device where it begins."""
    if candidate.sprint is None:
        scheduler = sampler(candidate.model, candidate.sampler)
    else:
        scheduler = sana_sprint.scheduler(candidate.sprint)
    stock = scheduler.set_timesteps

    def set_timesteps(*arguments: Any, **options: Any) -> None:
        if hasattr(scheduler, "set_begin_index"):
            try:
                stock(*arguments, **options)
            except NotImplementedError:  # it takes back what it put there: nothing, of meta tensors
                stock(*arguments, **{**options, "device": "cpu"})
                scheduler.timesteps = scheduler.timesteps.to(options["device"])
            scheduler.set_begin_index(0)
        else:  # its table is on the host, where it looks up with the timesteps themselves
            stock(*arguments, **{**options, "device": "cpu"})

    set_timesteps.__signature__ = inspect.signature(stock)  # type: ignore[attr-defined]
    scheduler.set_timesteps = set_timesteps
    return scheduler


def _component(
    candidate: Candidate, family: Family, name: str, device: torch.device, tracker: Tracker
) -> nn.Module:
    """A frozen component on `device`, its weights unset and named so."""
    stated = next(c for c in candidate.model.components if c.name == name)
    module = family.empty(candidate.model, name, DTYPES[stated.dtype], device)
    module.eval().requires_grad_(False)
    tracker.register([*module.parameters(), *module.buffers()], "weights")
    return module


def while_quantised(stated: Component, module: nn.Module, dtype: torch.dtype) -> int:
    """Bytes on the device beside `module` while it is loaded, if it is quantised there."""
    if stated.quantize == "none" or stated.quantize_on != "device":
        return 0
    return most_beside(module, dtype)


def example_embedding(
    model: Model, family: Family, text: Text, precision: Precision, device: torch.device = HOST
) -> Mapping[str, Tensor]:
    """The embedding of one prompt of full length, zeros, as a cache holds it."""
    configs = {name: json.loads(config) for name, config in model.configs.items()}
    shapes = family.card.embedding_shapes(configs, text.max_length)
    dtype = DTYPES[precision.cache]
    return {name: torch.zeros(shape, dtype=dtype, device=device) for name, shape in shapes.items()}
