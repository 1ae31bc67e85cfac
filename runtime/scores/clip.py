"""The CLIP score of a picture and its prompt.

Hessel et al. 2021, "CLIPScore: A Reference-free Evaluation Metric for Image Captioning", equation
1, with 100 in the place of their 2.5: 100 max(cos(E_image, E_text), 0), from 0 to 100. The model
works on the processor in float32, so that it takes no device memory and gives the same anywhere.
"""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image

from runtime.errors import MachineUnfit, first_line


class ClipScore:
    """A CLIP model in host memory."""

    def __init__(self, name: str) -> None:
        """`name` is a folder or a hub id. Raises MachineUnfit if it can't be loaded."""
        from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

        try:
            model: Any = CLIPModel.from_pretrained(name, dtype=torch.float32)
            self._tokenizer: Any = AutoTokenizer.from_pretrained(name)
            self._pixels: Any = CLIPImageProcessor.from_pretrained(name)
        except (OSError, ValueError, KeyError, ImportError) as error:
            first = first_line(error)
            raise MachineUnfit(
                f"the model of the CLIP score, `{name}`, can't be loaded: {first}",
                help="`--set validation.clip_score=false` runs without it",
            ) from error
        self._model = model.eval().requires_grad_(False)
        self._tokens = int(model.config.text_config.max_position_embeddings)

    @torch.no_grad()
    def score(self, image: Image.Image, prompt: str) -> float:
        """Of one picture (RGB); a prompt of more tokens than the model has places for is cut."""
        text = self._tokenizer(
            [prompt], truncation=True, max_length=self._tokens, return_tensors="pt"
        )
        pixels = self._pixels(images=[image], return_tensors="pt")["pixel_values"]
        found = self._model(
            input_ids=text["input_ids"],
            attention_mask=text["attention_mask"],
            pixel_values=pixels.float(),
        )
        cosine = torch.nn.functional.cosine_similarity(found.image_embeds, found.text_embeds)
        return 100.0 * max(cosine.item(), 0.0)
