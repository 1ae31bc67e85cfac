"""A family without models: encodings are simple functions of what is encoded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from attrs import evolve
from torch import Tensor, nn

from compiler.families.card import FamilyCard
from compiler.plan import Component, Plan, Text
from runtime.families.base import TextEmbedding


class FakeFamily:
    """Records what it loads and encodes; has a posterior like Stable Diffusion's VAE."""

    def __init__(self, card: FamilyCard) -> None:
        self.card = card
        self.loaded: list[str] = []
        self.prompts: list[tuple[str, bool]] = []
        self.pictures = 0
        self.fail_at: int | None = None

    def load(self, model: Any, name: str, dtype: torch.dtype, device: torch.device) -> Any:
        self.loaded.append(name)
        return nn.Identity()

    def encode_with(
        self,
        encoder: str,
        parts: Mapping[str, Any],
        prompts: Sequence[str],
        text: Text,
        *,
        negative: bool = False,
    ) -> list[TextEmbedding]:
        assert set(parts) == {"tokenizer", encoder} == {"tokenizer", "text_encoder"}
        self.prompts += [(prompt, negative) for prompt in prompts]
        return [embedding_of(prompt, negative) for prompt in prompts]

    def join_text(self, shares: Mapping[str, TextEmbedding]) -> TextEmbedding:
        return shares["text_encoder"]

    def collate_text(self, embeddings: Sequence[TextEmbedding]) -> dict[str, Tensor]:
        states = [e["states"] for e in embeddings]
        return {"states": nn.utils.rnn.pad_sequence(states, batch_first=True)}

    def encode_pixels(self, vae: nn.Module, pixels: Tensor) -> dict[str, Tensor]:
        if self.pictures == self.fail_at:
            raise KeyboardInterrupt
        self.pictures += 1
        mean = nn.functional.avg_pool2d(pixels, 8)
        return {"mean": mean, "std": mean.abs() * 0.1}

    def latents(
        self, cached: Mapping[str, Tensor], vae_config: Mapping[str, Any], noise: Tensor | None
    ) -> Tensor:
        assert noise is not None and cached["mean"].dtype == torch.float32
        return (cached["mean"] + cached["std"] * noise) * float(vae_config["scaling_factor"])


def embedding_of(prompt: str, negative: bool) -> dict[str, Tensor]:
    """(tokens, 4): as many tokens as words, at least one."""
    seed = int.from_bytes(hashlib.sha256(f"{negative}{prompt}".encode()).digest()[:4], "big")
    generator = torch.Generator().manual_seed(seed)
    return {"states": torch.randn(len(prompt.split()) + 1, 4, generator=generator)}


def fake_base(plan: Plan, folder: Path) -> Plan:
    """`plan` with a base that has the files, but not the models, of a pipeline."""
    names = ("tokenizer", "text_encoder", "vae", "transformer")
    for name in names:
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "config.json").write_text(json.dumps({"part": name}))
    components = tuple(
        Component(name=n, class_name="Fake", parameters=0, dtype="float32", trained=n == names[-1])
        for n in names
    )
    configs = {"vae": json.dumps({"scaling_factor": 2.0})}
    model = evolve(plan.model, base=str(folder), components=components, configs=configs)
    return evolve(plan, model=model)
