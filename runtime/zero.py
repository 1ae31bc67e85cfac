"""A model that DeepSpeed shares out over the ranks (ZeRO), set up through Accelerate.

Rajbhandari et al., "ZeRO: memory optimizations toward training trillion parameter models", arXiv
1910.02054. Stage 1 deals out the optimizer's state with the float32 weights that it updates, stage
2 the gradients too, stage 3 the weights that compute as well. The float32 weights lie in flat
pieces, one for each rank; what computes is rounded from them.

DeepSpeed has the backward pass, sums, clips and updates. It averages gradients over the ranks where
we add them up, so losses are multiplied by their number. It makes no update where the norm of all
gradients is not finite (`step` of its optimizers), and knows nothing of losses; so a loss that is
not finite is given gradients that are none. All ranks have to make equally many passes, since what
these leave is dealt out after each.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Mapping
from typing import Any

import torch
from attrs import evolve
from torch import Tensor, nn

from compiler.machine import DEEPSPEED
from compiler.plan import Plan, Sharing
from runtime.ema import Ema
from runtime.errors import MachineUnfit
from runtime.families.base import Family
from runtime.methods.base import Built
from runtime.optimizers import make_optimizer
from runtime.ranks import Ranks, connected
from runtime.together import Together

REDUCED = 1 << 24  # elements at most that wait to be summed together; DeepSpeed's own is 30 times
SHARED_MEMORY = "deepspeed_shm_comm"  # kernels that would be compiled for minutes; gloo is enough


class Zero(Together):
    """This rank's part of what DeepSpeed holds. `optimizer` is the plan's, over flat pieces."""

    updates = True

    def __init__(
        self, plan: Plan, family: Family, built: Built, device: torch.device, ranks: Ranks
    ) -> None:
        super().__init__(plan, family, built.model, device, ranks)
        self._trained = dict(built.trainable)
        start = {name: p.detach().clone() for name, p in self._trained.items()}
        # What is updated may lie on the host, where the fused kernels of a device can't go.
        optimizer = evolve(
            plan.optimizer, fused=plan.optimizer.fused and not plan.sharing.offload_optimizer
        )
        self.optimizer = make_optimizer(optimizer, self._trained.items(), device)
        for group in self.optimizer.param_groups:
            group.pop("param_names", None)  # pieces have none
        self._engine = _engine(built.model, self.optimizer, plan, device)
        self.called = Called(built.model, self._engine)
        self._left = 0  # passes until the update
        self.backward = self._backward
        for name, value in start.items():  # the engine has rounded them to what computes
            _library().safe_set_full_fp32_param(self._trained[name], value.to(device))

    @property
    def sharing(self) -> Sharing:
        """How it is shared out."""
        return self._plan.sharing

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The model's own weights, in the type that computes."""
        return self._trained

    def behind(self, passes: int) -> int:
        """See `Together.behind`."""
        fewer = super().behind(passes)
        self._left = passes + fewer
        return fewer

    def _backward(self, loss: Tensor) -> None:
        self._left -= 1
        self._engine.set_gradient_accumulation_boundary(self._left == 0)
        # A loss may be infinite while its gradients are finite. Told on the device, unread.
        told = torch.where(torch.isfinite(loss.detach()), float(self._ranks.count), math.nan)
        self._engine.backward(loss * told)

    def collect(self) -> None:
        """Nothing to hand over: the sums are where the update is made."""

    def norm(self) -> Tensor:
        """See `Together.norm`. Makes the update, unless the norm or some rank's loss is not finite;
        the norm is infinite then."""
        self._engine.step()
        if not self._engine.was_step_applied():
            self._forget()
        norm = self._engine.get_global_grad_norm()
        return torch.as_tensor(norm, dtype=torch.float32, device=self._device)

    def _forget(self) -> None:
        """Drop the sums of a step that was left out. DeepSpeed keeps those that it has on the host
        (`averaged_gradients` in `step` of stage_1_and_2.py, 0.19), and adds the next ones to them.
        """
        sums = getattr(self._engine.optimizer, "averaged_gradients", {})
        if self._plan.sharing.stage < 3 and self._plan.sharing.offload_optimizer:
            sums.update(dict.fromkeys(sums))

    def led(self, task: Any, ema: Ema | None, following: Any) -> None:
        """See `Together.led`. Until stage 3 rank 0 has the whole model, and needs nobody."""
        if self._plan.sharing.stage < 3:
            self._ranks.led(task)
        else:
            super().led(task, ema, following)

    @torch.no_grad()
    def gathered(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The whole float32 weights, in host memory, whatever `values` are; {} in all ranks but the
        first. They come to the device one at a time."""
        found = {}
        for name, parameter in self._trained.items():
            with connected():
                whole = _library().safe_get_full_fp32_param(parameter)
            if self._ranks.leads:
                found[name] = whole.to("cpu", copy=True)
        return found

    def save(self, folder: str, tag: str) -> None:
        """Write each rank's part below `folder`, all ranks together. Raises OSError."""
        with connected():
            self._engine.save_checkpoint(folder, tag=tag, exclude_frozen_parameters=True)

    def load(self, folder: str, tag: str) -> bool:
        """Read this rank's part; False if it is not there."""
        with connected():
            found, _ = self._engine.load_checkpoint(folder, tag=tag, load_module_strict=False)
        return found is not None


class Called:
    """A model that is called through DeepSpeed's engine, and else itself: `config` is its own."""

    def __init__(self, model: nn.Module, engine: Any) -> None:
        self._model, self._engine = model, engine

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """The model's output. The engine then knows that a backward pass follows."""
        return self._engine(*arguments, **named)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def check_zero(plan: Plan) -> None:
    """Raise MachineUnfit if the plan needs DeepSpeed and it is not here."""
    if plan.sharing.strategy == "deepspeed" and importlib.util.find_spec(DEEPSPEED) is None:
        raise MachineUnfit(
            'strategy "deepspeed" needs the package `deepspeed`',
            help='pip install "tuner[deepspeed]"',
        )


def settings(plan: Plan) -> dict[str, Any]:
    """DeepSpeed's configuration for the plan. Batches are ours: it counts passes only."""
    sharing, cuda = plan.sharing, plan.device == "cuda"
    shared: dict[str, Any] = {
        "stage": sharing.stage,
        "reduce_bucket_size": REDUCED,
        "allgather_bucket_size": REDUCED,
        "overlap_comm": False,
    }
    if sharing.stage == 3:
        shared["stage3_prefetch_bucket_size"] = REDUCED
        shared["stage3_max_live_parameters"] = REDUCED  # else layers stay until there are 1e9
        shared["stage3_max_reuse_distance"] = REDUCED
    if sharing.offload_optimizer:
        shared["offload_optimizer"] = {"device": "cpu", "pin_memory": cuda}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": plan.max_grad_norm,
        "zero_optimization": shared,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "bf16": {"enabled": plan.precision.compute == "bfloat16", "check_grad_overflow": True},
    }


def _engine(
    model: nn.Module, optimizer: torch.optim.Optimizer, plan: Plan, device: torch.device
) -> Any:
    """DeepSpeed's engine around `model`, which it moves to the device and deals out."""
    if device.type == "cpu":  # both would look for an accelerator
        os.environ |= {"DS_ACCELERATOR": "cpu", "ACCELERATE_TORCH_DEVICE": "cpu"}
    from accelerate import Accelerator, DeepSpeedPlugin

    importlib.import_module("deepspeed.ops").__compatible_ops__[SHARED_MEMORY] = False
    with connected():
        # Not `zero3_init_flag`: it would deal out every model that is loaded from now on.
        plugin = DeepSpeedPlugin(hf_ds_config=settings(plan), zero3_init_flag=False)
        computes = "bf16" if plan.precision.compute == "bfloat16" else "no"
        accelerator = Accelerator(deepspeed_plugin=plugin, mixed_precision=computes)
        engine, _ = accelerator.prepare(model, optimizer)
    return engine


def _library() -> Any:
    """What reads and writes the float32 weights of a parameter."""
    return importlib.import_module("deepspeed.utils")


def zeroed(
    built: Built, plan: Plan, family: Family, device: torch.device, ranks: Ranks
) -> tuple[Built, Zero]:
    """`built`, shared out over the ranks. It may lie in host memory."""
    zero = Zero(plan, family, built, device, ranks)
    return evolve(built, trainable=zero.parameters), zero
