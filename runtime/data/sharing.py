"""Several ranks fill one cache: each encodes a share on its own device, and writes its own shards.

Whose a prompt or a picture is follows from its key, not from what is missing at the moment, so that
ranks which look at different moments leave nothing out and encode nothing twice. Ranks on other
machines than rank 0's leave all to it: the cache's index needs a disk with working locks.
"""

from __future__ import annotations

import socket
import uuid
from collections.abc import Callable, Sequence
from typing import TypeVar

from attrs import frozen

from runtime import ranks as whole
from runtime.ranks import Ranks

_T = TypeVar("_T")


@frozen
class Team:
    """Those that fill a cache together, as one of them sees it."""

    ranks: Ranks
    members: tuple[int, ...]  # ranks that encode

    def takes(self, key: bytes, total: int, least: int = 1) -> bool:
        """Whether this rank encodes what has `key`, one of `total`; so many take part that each
        has about `least` of them or more."""
        count = min(len(self.members), max(1, total // least))
        member = int.from_bytes(key[:8], "big") % count
        return self.members[member] == self.ranks.rank

    def first(self, task: Callable[[], _T]) -> _T:
        """`task`'s result; rank 0 does it first, and what it notes spares the others its work."""
        if not self.ranks.leads:
            self.ranks.told("")
            return task()
        found = task()
        self.ranks.told("")
        return found

    def tally(self, mine: int, more: int) -> int:
        """How much all have done together since they last met; see `Ranks.tally`."""
        return self.ranks.tally(mine, more)

    def meet(self, word: str = "") -> Sequence[str]:
        """The words of all ranks, once all have done their share. Raises RanksLost where one is
        no more."""
        return self.ranks.meet(word)


def team_of(ranks: Ranks) -> Team:
    """The ranks on rank 0's machine. Called by all, inside `ranks.alive()`."""
    places = ranks.meet(f"{socket.gethostname()} {uuid.getnode()}")
    return Team(ranks, tuple(r for r, place in enumerate(places) if place == places[0]))


ALONE = Team(whole.ALONE, (0,))
