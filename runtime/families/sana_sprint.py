"""Drawing with a distilled Sana, by Diffusers' own pipeline for it. All else is Sana's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attrs import evolve
from torch import Tensor

from compiler.families import sana
from compiler.plan import Sprint
from runtime.families import common
from runtime.families.base import TextEmbedding
from runtime.families.sana import Sana

SCHEDULER = "SCMScheduler"
INTERMEDIATE = 1.3  # the angle between two steps, as the pipeline has it; other counts have none


class SanaSprint(Sana):
    """SanaSprintPipeline and SCMScheduler around Sana's own components."""

    card = evolve(
        sana.CARD,
        pipeline=sana.CARD.few_step_pipeline,
        components={**sana.CARD.components, "scheduler": SCHEDULER},
    )

    def denoise(
        self,
        parts: Mapping[str, Any],
        positive: TextEmbedding,
        negative: TextEmbedding,
        *,
        width: int,
        height: int,
        guidance: float,
        steps: int,
        seed: int,
    ) -> Tensor:
        """See `Family.denoise`. The guidance scale is told to the network: `negative` is unused."""
        pipeline = common.stock_pipeline(self.card, parts)
        prompt = self.prompts(positive, negative, pipeline.transformer)
        with common.inference(parts["transformer"]):
            latents: Tensor = pipeline(
                prompt=None,
                width=width,
                height=height,
                guidance_scale=guidance,
                num_inference_steps=steps,
                intermediate_timesteps=INTERMEDIATE if steps == 2 else None,
                generator=common.cpu_generator(seed),
                use_resolution_binning=False,
                output_type="latent",
                prompt_embeds=prompt["prompt_embeds"],
                prompt_attention_mask=prompt["prompt_attention_mask"],
            ).images
        return latents


def scheduler(facts: Sprint) -> Any:
    """The scheduler that the student is made for."""
    import diffusers

    return getattr(diffusers, SCHEDULER)(sigma_data=facts.sigma_data)


def few_steps(facts: Sprint, folder: Path) -> None:
    """Make the Sana pipeline in `folder`, whose network is a student, one of few steps."""
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    index |= {"_class_name": FAMILY.card.pipeline, "scheduler": ["diffusers", SCHEDULER]}
    text = json.dumps(index, indent=2) + "\n"
    (folder / "model_index.json").write_text(text, encoding="utf-8")
    shutil.rmtree(folder / "scheduler", ignore_errors=True)
    scheduler(facts).save_pretrained(folder / "scheduler")


FAMILY = SanaSprint()
