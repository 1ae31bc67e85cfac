"""Several processes (ranks) train one model together: what they add up, and what they agree on.

Each rank holds the whole model, its optimizer and its average, and runs its own batches of a step's
window. Then the gradients are summed over the ranks, and all of them make the same update. All fill
the cache (`runtime.data.sharing`). Rank 0 leads: it alone saves, draws and reports, while the
others wait.

torch's DistributedDataParallel is not used. It reduces the gradients of the model's own parameters
once for each backward pass, in hooks of its own. Here the optimizer may own float32 masters, which
other hooks fill; checkpointed and offloaded blocks have hooks too; and a rank may have one batch
more than another, or none. So gradients are summed once a step, after the last backward pass.

Waiting for rank 0 has no time limit, as it may encode for hours: it goes through a key-value store.
Reductions do have one, for all ranks are in the same step then.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from attrs import frozen
from torch import Tensor, nn

from runtime.batch import Batch
from runtime.errors import MachineUnfit, RunFailed, first_line
from runtime.out_of_memory import is_out_of_memory

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

    from runtime.data.feed import Window

JOINING = timedelta(minutes=30)  # until the first rank is there: it may compile the recipe first
REDUCING = timedelta(minutes=30)  # how far apart ranks may be within a step
POLL_SECONDS = 0.05
BUCKET = 1 << 23  # elements that are reduced together: 32 MiB in float32
OVER = "over"  # in the store once a rank has failed: the exit code of the others, "" for their own
JOINED, HEARD = "joined", "heard"  # how many ranks follow, and how many of them have read that
STARTING_SECONDS = 60.0  # for ranks that have not joined yet
HEARING_SECONDS = 3.0  # for those that have; one that was killed never hears
BEAT_SECONDS = 2.0  # between two signs of life
SILENCE_SECONDS = 120.0  # without one: loading may keep Python busy, but not for so long


class RanksLost(RunFailed):
    """Another rank has ended, so that this one can't go on. The reason is the other's to tell, and
    so may be the exit `code` (None: it said none)."""

    def __init__(self, why: object = "", code: int | None = None) -> None:
        self.code = code
        super().__init__(
            "another process of this run has ended" + (f" ({why})" if why else ""),
            help="what was saved before is whole: run again",
        )


@frozen(kw_only=True)
class Place:
    """Where a batch of one rank stands in the whole window."""

    part: int  # micro-batches before it
    slot: int  # samples before it


class Ranks:
    """One process that trains alone: nothing to add up, nobody to agree with."""

    rank = 0
    count = 1
    local = 0  # number of this process, and of its device, on its machine

    @property
    def leads(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def form(self, device: torch.device) -> None:
        """Connect the ranks; no sum before it. Raises MachineUnfit."""

    def leave(self) -> None:
        """No sum will follow."""

    def told(self, word: str) -> str:
        """Rank 0's word; waits for it without a limit."""
        return word

    def led(self, task: Callable[[], None]) -> None:
        """Rank 0 does `task`; the others wait until it is done."""
        task()

    def words(self, word: str) -> list[str]:
        """The words of all ranks, in their order."""
        return [word]

    @contextmanager
    def alive(self) -> Iterator[None]:
        """Inside, this rank gives signs of life to those that wait in `meet`."""
        yield

    def meet(self, word: str) -> list[str]:
        """As `words`, where ranks do work of any length alone before. Raises RanksLost where one
        gives no sign of life any more."""
        return [word]

    def tally(self, mine: int, more: int) -> int:
        """How much all ranks have done since they last met. This one has done `mine`, of which
        `more` since it last told."""
        return mine

    def any(self, *flags: bool) -> list[bool]:
        """For each flag whether it is set in any rank."""
        return list(flags)

    def most(self, number: int) -> int:
        """The largest of the ranks' numbers."""
        return number

    def parts(self, window: Window, size: int) -> Iterator[tuple[int, Batch]]:
        """This rank's micro-batches of at most `size` samples, by number in the whole window."""
        yield from enumerate(part for batch in window.batches for part in batch.parts(size))

    def names(self, window: Window) -> Sequence[str]:
        """The samples of the whole window, as `losses` has them."""
        return window.names

    def losses(self, window: Window, mine: Sequence[Tensor], device: torch.device) -> Tensor:
        """Losses of the whole window, (samples,), from those of this rank's micro-batches."""
        return torch.cat(list(mine))

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Each gradient becomes the sum over all ranks, added up in float32."""


ALONE = Ranks()


class Group(Ranks):
    """One of several processes that train together. Any method raises RanksLost where another one
    is no more."""

    def __init__(self, store: Store, rank: int, count: int, local: int) -> None:
        self.rank, self.count, self.local = rank, count, local
        self._store = store
        self._met = 0  # how often `told` and `words` were called
        self._trained: dict[int, set[int]] = {}
        """By how many are trained: positions of the parameters that have gradients."""

    def form(self, device: torch.device) -> None:
        """Connect: gloo between processors, NCCL between CUDA devices."""
        from torch.distributed import PrefixStore  # type: ignore[attr-defined]

        if device.type == "cuda" and not dist.is_nccl_available():
            raise MachineUnfit("this torch has no NCCL, which several CUDA devices need")
        self._trained.clear()
        with peers():
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                store=PrefixStore(f"group-{self._met}", self._store),
                rank=self.rank,
                world_size=self.count,
                timeout=REDUCING,
            )

    def leave(self) -> None:
        """Give back what the connections hold."""
        dist.destroy_process_group()

    def fail(self, code: int | None = None) -> None:
        """Let those that wait know that they wait in vain, and are to end with `code`."""
        with suppress(RuntimeError):
            if not self._store.check([OVER]):  # the first one's word
                self._store.set(OVER, "" if code is None else str(code))

    def dismiss(self, code: int) -> None:
        """As `fail`, at the end of this process, with which the store may end too: waits until all
        have heard, but not for long."""
        self.fail(code)
        until = time.monotonic() + STARTING_SECONDS
        with suppress(RuntimeError):
            while self._store.add(HEARD, 0) < self.count - 1 and time.monotonic() < until:
                if self._store.add(JOINED, 0) == self.count - 1:
                    until = min(until, time.monotonic() + HEARING_SECONDS)
                time.sleep(POLL_SECONDS)

    def _judge(self) -> None:
        """Raise RanksLost if a rank has failed."""
        if self._store.check([OVER]):
            code = self._store.get(OVER).decode()
            self._store.add(HEARD, 1)
            raise RanksLost(code=int(code) if code else None)

    def blame(self) -> bool:
        """Whether this rank is the first that failed, and so the one to say why."""
        try:
            return self._store.add("blame", 1) == 1
        except RuntimeError:
            return False
        finally:
            self.fail()

    def offer(self, key: str, word: str) -> None:
        """Lay down `word`, for whoever waits for `key`."""
        with peers():
            self._store.set(key, word)

    def wanted(self, key: str) -> str:
        """What was laid down under `key`; waits for it without a limit."""
        with peers():
            while not self._store.check([key]):
                self._judge()
                time.sleep(POLL_SECONDS)
            return str(self._store.get(key).decode())

    def told(self, word: str) -> str:
        """See `Ranks.told`."""
        self._met += 1
        if self.leads:
            self.offer(f"told-{self._met}", word)
            return word
        return self.wanted(f"told-{self._met}")

    def led(self, task: Callable[[], None]) -> None:
        """See `Ranks.led`."""
        if self.leads:
            task()
        self.told("")

    def words(self, word: str) -> list[str]:
        """See `Ranks.words`."""
        self._met += 1
        self.offer(f"words-{self._met}-{self.rank}", word)
        return [self.wanted(f"words-{self._met}-{rank}") for rank in range(self.count)]

    @contextmanager
    def alive(self) -> Iterator[None]:
        """See `Ranks.alive`. A thread of its own: the work may hold up the others for long."""
        ended = threading.Event()

        def beat() -> None:
            with suppress(RuntimeError):  # rank 0 is gone: whoever meets will say so
                while not ended.is_set():
                    self._store.add(f"alive-{self.rank}", 1)
                    ended.wait(BEAT_SECONDS)

        thread = threading.Thread(target=beat, name="alive", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def meet(self, word: str) -> list[str]:
        """See `Ranks.meet`."""
        self._met += 1
        self.offer(f"met-{self._met}-{self.rank}", word)
        return [self._awaited(f"met-{self._met}-{rank}", rank) for rank in range(self.count)]

    def _awaited(self, key: str, rank: int) -> str:
        """As `wanted`, of a rank that gives signs of life; before the first one it may take as long
        as joining does."""
        signs, since = 0, time.monotonic()
        with peers():
            while not self._store.check([key]):
                now = int(self._store.add(f"alive-{rank}", 0))
                if now != signs:
                    signs, since = now, time.monotonic()
                silent = time.monotonic() - since
                self._judge()
                if silent > (SILENCE_SECONDS if signs else JOINING.total_seconds()):
                    raise RanksLost(f"no sign of life of rank {rank} for {silent:.0f} seconds")
                time.sleep(POLL_SECONDS)
            return str(self._store.get(key).decode())

    def tally(self, mine: int, more: int) -> int:
        """See `Ranks.tally`."""
        with peers():
            return int(self._store.add(f"tally-{self._met}", more))

    def any(self, *flags: bool) -> list[bool]:
        """See `Ranks.any`. Through host memory: nothing waits for a device."""
        told = torch.tensor(flags, dtype=torch.int32)
        with peers():
            dist.all_reduce(told, dist.ReduceOp.MAX)
        return [bool(flag) for flag in told.tolist()]

    def most(self, number: int) -> int:
        """See `Ranks.most`. Through host memory: nothing waits for a device."""
        told = torch.tensor(number)
        with peers():
            dist.all_reduce(told, dist.ReduceOp.MAX)
        return int(told.item())

    def parts(self, window: Window, size: int) -> Iterator[tuple[int, Batch]]:
        """See `Ranks.parts`."""
        for place, batch in zip(window.places, window.batches, strict=True):
            yield from enumerate(batch.parts(size), place.part)

    def names(self, window: Window) -> Sequence[str]:
        """See `Ranks.names`."""
        return window.all_names

    def losses(self, window: Window, mine: Sequence[Tensor], device: torch.device) -> Tensor:
        """See `Ranks.losses`: each rank fills in its samples, zeros elsewhere, and all are added.

        A loss that is no number stays with its sample.
        """
        whole = torch.zeros(window.samples, device=device)
        own = torch.cat(list(mine)).float() if mine else whole[:0]
        at = 0
        for place, batch in zip(window.places, window.batches, strict=True):
            count = batch.latents.shape[0]
            whole[place.slot : place.slot + count] = own[at : at + count]
            at += count
        with peers():
            dist.all_reduce(whole)
        return whole

    @torch.no_grad()
    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """See `Ranks.sum_gradients`. A rank without a gradient adds zeros."""
        gradients = []
        for parameter in self._with_gradients(list(parameters)):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        with peers():
            for bucket in buckets(gradients):
                _sum(bucket)

    def _with_gradients(self, parameters: list[nn.Parameter]) -> list[nn.Parameter]:
        """Those that have a gradient in any rank. Which ones is a fact of the model, and of how
        much of it is trained at a time, so that the ranks ask each other only once."""
        mine = {index for index, p in enumerate(parameters) if p.grad is not None}
        if (count := len(parameters)) not in self._trained:
            found = self.any(*(index in mine for index in range(count)))
            self._trained[count] = {index for index, there in enumerate(found) if there}
        trained = self._trained[count]
        assert mine <= trained, "a model has the same gradients in every step"
        return [p for index, p in enumerate(parameters) if index in trained]


def buckets(tensors: Sequence[Tensor], most: int = BUCKET) -> Iterator[list[Tensor]]:
    """`tensors` in order, in groups of at most `most` elements; a larger one is alone."""
    held: list[Tensor] = []
    count = 0
    for tensor in tensors:
        if held and count + tensor.numel() > most:
            yield held
            held, count = [], 0
        held.append(tensor)
        count += tensor.numel()
    if held:
        yield held


def _sum(bucket: Sequence[Tensor]) -> None:
    """Sum over the ranks, in float32: a large tensor in place, small ones in one flat buffer."""
    first = bucket[0]
    if len(bucket) == 1 and first.dtype == torch.float32 and first.is_contiguous():
        dist.all_reduce(first)
        return
    flat = torch.cat([tensor.reshape(-1).float() for tensor in bucket])
    dist.all_reduce(flat)
    parts = torch.split(flat, [tensor.numel() for tensor in bucket])
    for tensor, part in zip(bucket, parts, strict=True):
        tensor.copy_(part.view(tensor.shape))


@contextmanager
def peers() -> Iterator[None]:
    """Inside, a failed connection means that a peer is gone."""
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise RanksLost(first_line(error)[:200]) from error


@contextmanager
def connected() -> Iterator[None]:
    """As `peers`, around code that also does other things: only what the connections raise counts.

    Raises RanksLost where a peer is gone.
    """
    try:
        yield
    except RuntimeError as error:
        if is_disconnected(error):
            raise RanksLost(first_line(error)[:200]) from error
        raise


def is_disconnected(error: BaseException) -> bool:
    """Whether it is the connections' own: a peer is gone."""
    if is_out_of_memory(error):  # the connections' own buffers
        return False
    return isinstance(error, dist.DistError) or any(n in str(error) for n in ("gloo", "NCCL"))


def join() -> Group:
    """This process's place among those that the environment tells of, as torchrun sets it: RANK,
    WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. Raises RunFailed if they can't be met.

    Rank 0 holds the store, unless torchrun's agent does.
    """
    if not dist.is_available():
        raise MachineUnfit("this torch is built without what several processes need")
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

    rank, count, local = (int(os.environ[k]) for k in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        store = TCPStore(
            address,
            port,
            is_master=rank == 0 and not by_agent,
            timeout=JOINING,
            wait_for_workers=False,
        )
    except RuntimeError as error:
        raise RunFailed(
            f"rank {rank} of {count} can't reach {address}:{port}: {first_line(error)}",
            help="MASTER_ADDR and MASTER_PORT must be those of the machine of rank 0",
        ) from error
    again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    own = PrefixStore(f"tuner-{again}", store)
    if rank > 0:
        with peers():
            own.add(JOINED, 1)
    return Group(own, rank, count, local)
