"""The training step: what the loop runs on real tensors and the memory simulation on meta tensors.

The model runs in `precision.compute` throughout, as it does at inference, without autocast: norms,
residuals and attention then round alike in training and in the pipeline (autocast would also turn
Sana's float32 linear attention into bfloat16). Noise levels, noising and loss are float32.
Gradients arrive in `precision.trained`, see `runtime.methods.base`. Nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from compiler.plan import Objective, Precision
from runtime.batch import Batch
from runtime.families.base import Family
from runtime.families.common import DTYPES, inference
from runtime.methods.base import LOSS, Method
from runtime.methods.frozen import adapters_off
from runtime.objective import noised, per_sample_loss
from runtime.text_training import TrainedText


def micro_step(
    family: Family,
    model: nn.Module,
    batch: Batch,
    objective: Objective,
    precision: Precision,
    window_samples: float,
    before_backward: Callable[[Tensor], None] | None = None,
    scale: Tensor | None = None,
    backward: Callable[[Tensor], None] | None = None,
    words: TrainedText | None = None,
) -> Tensor:
    """Forward and backward of one batch; gradients add up until `update`. Returns losses (B,).

    `window_samples` is the number of samples in the whole accumulation window, so that each sample
    weighs the same however the window is cut into batches. `before_backward` is given the losses
    (B,) when the forward pass is done. `scale` multiplies the gradients, see `runtime.scaler`.
    `backward` is what to do with the sum in place of autograd's backward pass. `words` are the text
    encoders that are trained too. Raises ValueError where no weight would be changed.
    """
    losses = forward_losses(family, model, batch, objective, precision, words)
    if not losses.requires_grad:
        raise ValueError("nothing that is trained has a say in what the model predicts")
    if before_backward is not None:
        before_backward(losses.detach())
    total = losses.sum() / window_samples
    total = total if scale is None else total * scale
    if backward is None:
        total.backward()  # type: ignore[no-untyped-call]
    else:
        backward(total)
    return losses.detach()


def method_step(
    method: Method, batch: Batch, step: int, window_samples: float
) -> dict[str, Tensor]:
    """As `micro_step`, of a method's own losses. Returns all of them, (B,) each."""
    found = method.losses(batch, step)
    losses = found[LOSS] if batch.weights is None else found[LOSS] * batch.weights
    (losses.sum() / window_samples).backward()  # type: ignore[no-untyped-call]
    return {**found, LOSS: losses.detach()}


def forward_losses(
    family: Family,
    model: nn.Module,
    batch: Batch,
    objective: Objective,
    precision: Precision,
    words: TrainedText | None = None,
) -> Tensor:
    """The loss of each sample, (B,) float32. A batch that `keeps_base` costs a second pass, with
    the embeddings of the base's own encoders."""
    compute = DTYPES[precision.compute]
    noisy = noised(batch, objective).to(compute)
    of_base = words is None or batch.keeps_base
    text = _told(batch.text, batch, objective, compute) if of_base else {}
    target = None
    if batch.keeps_base:
        with inference(model), adapters_off(model):
            target = family.predict(model, noisy, batch.sigmas, text)
    if words is not None:
        text = _told(words.of(batch), batch, objective, compute)
    prediction = family.predict(model, noisy, batch.sigmas, text)
    return per_sample_loss(prediction, batch, objective, target)


def _told(
    text: Mapping[str, Tensor], batch: Batch, objective: Objective, compute: torch.dtype
) -> dict[str, Tensor]:
    """What the model is told beside the noisy latents, in the number format that it computes in."""
    told = {k: v.to(compute) if v.is_floating_point() else v for k, v in text.items()}
    if objective.guidance is not None:
        told["guidance"] = torch.full_like(batch.sigmas, objective.guidance)
    return told


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """L2 norm over all gradients together, float32."""
    return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def update(optimizer: torch.optim.Optimizer, norm: Tensor, max_grad_norm: float) -> None:
    """Scale gradients of L2 norm `norm` down to `max_grad_norm` (0: don't), step, drop them."""
    if max_grad_norm > 0:
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        nn.utils.clip_grads_with_norm_(trained, max_grad_norm, norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
