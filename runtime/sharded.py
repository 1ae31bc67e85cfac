"""A model that is dealt out over the ranks: each holds a share of every weight (FSDP2).

Rajbhandari et al., "ZeRO: memory optimizations toward training trillion parameter models", arXiv
1910.02054, stage 3; torch's `fully_shard` moves the weights. A block's weights are gathered before
it computes and let go afterwards, and the sums of their gradients are dealt out again. Rank r holds
the r-th of `count` equal pieces of rows of each weight; the last ones may be shorter or empty.

The optimizer, its state and the average know only this rank's rows, as plain tensors. That is right
for optimizers whose update of one number reads no other (`compiler.optimizers.facts.row_by_row`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from attrs import evolve, frozen
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from compiler.plan import Plan, Precision
from runtime.families.base import Family
from runtime.families.common import DTYPES
from runtime.methods.base import Built
from runtime.modules import blocks_of
from runtime.ranks import Ranks, peers
from runtime.together import Together


@frozen(kw_only=True)
class Piece:
    """A trained weight."""

    whole: nn.Parameter  # the model's own: a DTensor
    mine: nn.Parameter  # this rank's rows of it, in the same memory
    host: DeviceMesh  # the ranks, for tensors in host memory

    @property
    def rows(self) -> slice:
        """Which of the whole's rows are this rank's."""
        mesh = self.of.device_mesh
        size = -(-self.whole.shape[0] // mesh.size())
        start = min(mesh.get_local_rank() * size, self.whole.shape[0])
        return slice(start, start + self.mine.shape[0])

    @property
    def of(self) -> DTensor:
        """The whole, by its type."""
        assert isinstance(self.whole, DTensor)
        return self.whole

    def dealt(self, rows: Tensor) -> DTensor:
        """`rows`, of the form of `mine`, as this rank's part of a tensor of the form of `whole`."""
        whole = self.of
        there = rows.device.type == whole.device_mesh.device_type  # else it would be moved
        return DTensor.from_local(
            rows,
            whole.device_mesh if there else self.host,
            [Shard(0)],
            run_check=False,
            shape=whole.shape,
            stride=whole.stride(),
        )


def shard(
    model: nn.Module,
    lists: tuple[str, ...],
    precision: Precision,
    device: torch.device,
    count: int,
    *,
    reshard: bool,
) -> None:
    """Deal the weights of `model` out, block by block of the module lists `lists`, and bring this
    rank's share to `device`. All else is gathered once for each pass through the model.

    Without `reshard` blocks stay gathered from their forward to their backward pass.
    """
    mesh: DeviceMesh = init_device_mesh(device.type, (count,))
    policy = MixedPrecisionPolicy(
        param_dtype=DTYPES[precision.compute],
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # noise levels stay float32
    )
    for buffer in model.buffers():  # not gathered: of the computation's type at once
        if buffer.is_floating_point():
            buffer.data = buffer.data.to(policy.param_dtype)
    for block in blocks_of(model, lists):
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for part in sharded_parts(model):
        part.set_gradient_divide_factor(1.0)  # summed, as losses are divided by all samples
        part.set_force_sum_reduction_for_comms(True)
    model._computes_in = DTYPES[precision.compute]  # type: ignore[assignment]
    type(model).dtype = property(_computes_in)  # type: ignore[attr-defined]


def _computes_in(model: Any) -> torch.dtype:
    """What a pipeline casts the model's inputs to; Diffusers would say what weights are kept in."""
    found: torch.dtype = model._computes_in
    return found


def sharded_parts(model: nn.Module) -> Iterator[FSDPModule]:
    """Those of the model's modules that are gathered as one."""
    yield from (module for module in model.modules() if isinstance(module, FSDPModule))


def pieces_of(model: nn.Module) -> dict[str, Piece]:
    """The trained weights of a sharded model by name."""
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    found: dict[str, Piece] = {}
    host: DeviceMesh | None = None
    for name, parameter in trained:
        assert isinstance(parameter, DTensor), "all of the model is sharded"
        mesh = parameter.device_mesh
        if host is None:
            host = mesh if mesh.device_type == "cpu" else init_device_mesh("cpu", (mesh.size(),))
        mine = nn.Parameter(parameter.to_local().detach())
        found[name] = Piece(whole=parameter, mine=mine, host=host)
    return found


class Shards(Together):
    """This rank's rows of a sharded model, and what all ranks do together with it.

    Any method raises RanksLost where another rank is no more.
    """

    def __init__(
        self, plan: Plan, family: Family, model: nn.Module, device: torch.device, ranks: Ranks
    ) -> None:
        super().__init__(plan, family, model, device, ranks)
        self.pieces = pieces_of(model)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """What the optimizer updates: this rank's rows, by the weights' names."""
        return {name: piece.mine for name, piece in self.pieces.items()}

    def collect(self) -> None:
        """Hand the sums of gradients that the backward passes left to the optimizer."""
        for piece in self.pieces.values():
            gradient, piece.whole.grad = piece.whole.grad, None
            piece.mine.grad = None if gradient is None else gradient.to_local()  # type: ignore[attr-defined]

    @torch.no_grad()
    def norm(self) -> Tensor:
        """L2 norm over all gradients of all ranks together, float32: the same in every rank."""
        own = [p.mine.grad for p in self.pieces.values() if p.mine.grad is not None]
        squares = torch.zeros((), dtype=torch.float64, device=self._device)
        if own:
            squares += nn.utils.get_total_norm(own).double() ** 2
        with peers():
            dist.all_reduce(squares)
        return squares.sqrt().float()

    @torch.no_grad()
    def gathered(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The whole tensors, in host memory, of which `values` are this rank's rows; {} in all
        ranks but the first. They come to the device one at a time."""
        found = {}
        for name, piece in self.pieces.items():
            with peers():
                whole = piece.dealt(values[name].to(self._device)).full_tensor()
            if self._ranks.leads:
                found[name] = whole.to("cpu", copy=True)
        return found

    def _let_go(self) -> None:
        """Drop what is gathered: weights may be others when the model is called again."""
        for part in sharded_parts(self._model):
            part.reshard()


def sharded(
    built: Built, plan: Plan, family: Family, device: torch.device, ranks: Ranks
) -> tuple[Built, Shards]:
    """`built`, dealt out over the ranks. It may lie in host memory."""
    shard(
        built.model,
        family.card.blocks,
        plan.precision,
        device,
        ranks.count,
        reshard=plan.sharing.reshard,
    )
    shards = Shards(plan, family, built.model, device, ranks)
    return evolve(built, trainable=shards.parameters), shards
