"""The model card: what a result is, where it came from, how it was made and how it is loaded."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from urllib.parse import quote

from compiler.adapters import ADAPTERS, INVERSION, LYCORIS_FILE, PEFT_FILE, described
from compiler.families import FAMILIES
from compiler.plan import Embeddings, Plan
from compiler.secrets import without_webhook
from runtime.new_tokens import FOLDER, file_of

TORCH = {"float32": "torch.float32", "bfloat16": "torch.bfloat16", "float16": "torch.float16"}
FRONT = re.compile(r"\A---\s*\n(.*?)\n---\s*(\n|\Z)", re.DOTALL)
LICENCE = re.compile(r"^(license|license_name|license_link):[ \t]*(\S.*?)[ \t]*$", re.MULTILINE)


def licence_in(readme: str) -> dict[str, str]:
    """The licence fields at the head of a model card, as text."""
    front = FRONT.match(readme.replace("\r\n", "\n"))
    found = LICENCE.findall(front[1]) if front else []
    return {key: value.strip("\"'") for key, value in found}


def card(
    plan: Plan,
    *,
    recipe: str,
    licence: Mapping[str, str],
    samples: Sequence[tuple[str, str]],
    step: int,
) -> str:
    """`README.md` of the repository `plan.publish.hub`.

    `samples` are (path in the repository, prompt), `step` is that of the result. The webhook's
    address is not shown: who knows it can write to it. A base in a local folder is called by the
    folder's name.
    """
    assert plan.publish is not None
    shown = without_webhook(recipe, plan.publish.webhook)
    parts = [
        _front(plan, licence, samples),
        f"# {plan.name}\n\n{_sentence(plan, step)}",
        _pictures(samples),
        f"## Use\n\n```python\n{_usage(plan)}```",
        f"## How it was trained\n\n{_table(plan, step)}",
    ]
    if shown.strip():
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", shown)), default=0))
        parts.append(f"## Recipe\n\n{fence}toml\n{shown.rstrip()}\n{fence}")
    parts.append("Made with tuner.")
    return "\n\n".join(part for part in parts if part) + "\n"


def _front(plan: Plan, licence: Mapping[str, str], samples: Sequence[tuple[str, str]]) -> str:
    """The fields that the hub reads (YAML; JSON strings are YAML strings)."""
    lines = [f"{key}: {json.dumps(value)}" for key, value in licence.items()]
    if not plan.model.local:
        relation = "adapter" if plan.adapter else "finetune"
        lines += [
            f"base_model: {json.dumps(plan.model.called)}",
            f"base_model_relation: {relation}",
        ]
    lines += ["library_name: diffusers", "pipeline_tag: text-to-image", "tags:"]
    tags = ["text-to-image", "diffusers", plan.model.family, "tuner"]
    lines += [f"- {tag}" for tag in (*tags, *([plan.adapter.kind] if plan.adapter else ()))]
    triggers = sorted({s.captions.trigger for s in plan.sources if s.captions.trigger})
    if triggers:
        lines.append(f"instance_prompt: {json.dumps(', '.join(triggers), ensure_ascii=False)}")
    if samples:
        lines.append("widget:")
        for path, prompt in samples:
            lines.append(f"- text: {json.dumps(prompt, ensure_ascii=False)}")
            lines.append(f"  output:\n    url: {json.dumps(path)}")
    return "\n".join(["---", *lines, "---"])


def _sentence(plan: Plan, step: int) -> str:
    method = "A full fine-tune of"
    if plan.adapter:
        method = f"A {described(plan.adapter)} for"
    elif plan.sprint is not None:
        method = "A student of one to four steps, distilled from"
    link = plan.model.called
    if not plan.model.local:
        link = f"[{link}](https://huggingface.co/{link})"
    is_average = plan.ema is not None and plan.ema.save == "average"
    averaged = ", averaged over the last of them (EMA)" if is_average else ""
    masked = ""
    if plan.adapter and plan.adapter.min_rank:
        masked = " Loaded as below it has all of its rank at all noise levels (T-LoRA)."
    return f"{method} {link}, trained for {step:,} steps{averaged}.{masked}"


def _pictures(samples: Sequence[tuple[str, str]]) -> str:
    if not samples:
        return ""
    drawn = "\n\n".join(f"![{_plain(prompt)}]({quote(path)})" for path, prompt in samples)
    return f"## Pictures\n\n{drawn}"


def _plain(text: str) -> str:
    """Text that Markdown leaves as it is in a picture's description."""
    return re.sub(r"([\[\]\\`*_<>])", r"\\\1", " ".join(text.split()))


def _new_tokens(plan: Plan, facts: Embeddings) -> list[str]:
    """Lines that teach the pipeline's encoders the new tokens."""
    assert plan.publish is not None and plan.adapter is not None
    hub, lines = json.dumps(plan.publish.hub), []
    folder = "" if plan.adapter.kind == INVERSION else f"{FOLDER}/"
    for token in facts.tokens:
        file = json.dumps(folder + file_of(facts, token))
        lines.append(f"vectors = load_file(hf_hub_download({hub}, {file}))")
        for encoder in facts.encoders:
            key = FAMILIES[plan.model.family].embedding_keys[encoder] or token.token
            tokenizer = encoder.replace("text_encoder", "tokenizer")
            lines += [
                "pipeline.load_textual_inversion(",
                f"    vectors[{json.dumps(key)}], token={json.dumps(token.token)},",
                f"    text_encoder=pipeline.{encoder}, tokenizer=pipeline.{tokenizer},",
                ")",
            ]
    return lines


def _usage(plan: Plan) -> str:
    assert plan.publish is not None
    family = FAMILIES[plan.model.family]
    pipeline, trained = family.pipeline, f"pipeline.{family.trained_component}"
    more = ""
    if plan.sprint is not None:
        pipeline = family.few_step_pipeline
        more = "" if plan.validation.steps == 2 else ", intermediate_timesteps=None"
    if family.guidance_argument == "true_cfg_scale":
        more += ', negative_prompt=" "'
    dtype = TORCH[plan.precision.compute]
    base, hub = json.dumps(plan.model.called), json.dumps(plan.publish.hub)
    prompt = plan.validation.prompts[0].text if plan.validation.prompts else "..."
    load = [f"pipeline = {pipeline}.from_pretrained({hub}, torch_dtype={dtype})"]
    imports = ["import torch", f"from diffusers import {pipeline}"]
    if plan.adapter:
        load = [f"pipeline = {pipeline}.from_pretrained({base}, torch_dtype={dtype})"]
        file = ADAPTERS[plan.adapter.kind].file
        if file == LYCORIS_FILE:
            imports += [
                "from huggingface_hub import hf_hub_download",
                "from lycoris import create_lycoris_from_weights",
            ]
            load += [
                f'file = hf_hub_download({hub}, "{file}")',
                f"network, _ = create_lycoris_from_weights(1.0, file, {trained})",
                "network.merge_to(1.0)",
            ]
        elif family.lora_loader == "peft" or file == PEFT_FILE:
            imports.append("from peft import PeftModel")
            load.append(f"{trained} = PeftModel.from_pretrained({trained}, {hub})")
        elif plan.adapter.kind != INVERSION:
            load.append(f"pipeline.load_lora_weights({hub})")
    if plan.embeddings is not None:
        imports += [
            "from huggingface_hub import hf_hub_download",
            "from safetensors.torch import load_file",
        ]
        load += _new_tokens(plan, plan.embeddings)
    return "\n".join(
        [
            *imports,
            "",
            *load,
            'pipeline.to("cuda")',
            f"image = pipeline(prompt={json.dumps(prompt, ensure_ascii=False)}, "
            f"num_inference_steps={plan.validation.steps}, "
            f"{family.guidance_argument}={plan.validation.guidance:g}{more}).images[0]",
            "",
        ]
    )


def _table(plan: Plan, step: int) -> str:
    optimizer, steps = plan.optimizer, plan.steps
    sizes = sorted({f"{b.width}x{b.height}" for b in plan.buckets})
    batches = sorted({b.batch_size for b in plan.buckets})
    rows = [
        ("images", f"{sum(s.images for s in plan.sources):,}"),
        ("sizes", f"{len(sizes)} buckets" if len(sizes) > 6 else ", ".join(sizes)),
        ("steps", _steps(plan, step)),
        ("batch", f"{', '.join(map(str, batches))} x {steps.accumulate} x {steps.ranks}"),
        ("optimizer", f"{optimizer.name}, learning rate {optimizer.lr:g}"),
        ("schedule", f"{plan.schedule.name}, {plan.schedule.warmup:,} steps of warm-up"),
        ("timesteps", f"{plan.objective.sampling}, {_shift(plan)}"),
        ("precision", f"{plan.precision.compute}, trained in {plan.precision.trained}"),
        ("seed", str(plan.seed)),
        ("plan", f"`{plan.digest}`"),
    ]
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows)])


def _steps(plan: Plan, step: int) -> str:
    """The steps behind the result, which are not all where it is the best checkpoint."""
    total = plan.steps.total
    if step != total:
        return f"{step:,}, the best of {total:,} by {plan.checkpoints.best}"
    return f"{total:,} ({plan.steps.epochs:,} epochs)"


def _shift(plan: Plan) -> str:
    if plan.objective.table is not None:
        return f"{plan.objective.table.schedule} betas"
    by_size = plan.objective.shift_by_size is not None
    return "shift by resolution" if by_size else f"shift {plan.objective.shift:g}"
