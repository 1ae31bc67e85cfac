"""Files that new words start from: their own, or what lies with the adapter's."""

from __future__ import annotations

import hashlib
from pathlib import Path

from attrs import evolve

from compiler import plan
from compiler.draft import Draft
from compiler.families.card import FamilyCard
from compiler.safetensors import Header, header_of
from compiler.spans import KeyPath
from compiler.words import beside, vector_keys


def with_start(
    draft: Draft, family: FamilyCard, where: KeyPath, token: plan.NewToken, said: str, alone: bool
) -> plan.NewToken:
    """`token` with the file to start from: `said` of the recipe, or found where the adapter starts
    from one. `alone`: it is the only word."""
    if said:
        return _own(draft, family, where, token, said)
    if draft.adapter is None or not draft.adapter.start:
        return token
    for path in beside(Path(draft.adapter.start), token.token, alone):
        header = header_of(path) if path.is_file() else None
        if header is None or not _sizes(header, family, token):
            continue
        return _held(draft, family, where, token, path, header)
    draft.warn(
        "bad-adapter",
        (*where, "name"),
        f"the adapter goes on from a file, and no `{token.token}` lies with it: the word starts "
        "anew",
        help='from = "FILE" in [[embeddings.token]] names the file of its vectors',
    )
    return token


def _own(
    draft: Draft, family: FamilyCard, where: KeyPath, token: plan.NewToken, said: str
) -> plan.NewToken:
    place = (*where, "from")
    try:
        path = (draft.folder / Path(said).expanduser()).resolve()
        there = path.is_file()
    except (OSError, ValueError, RuntimeError):
        there = False
    if not there:
        help = "a safetensors file of vectors, relative to the recipe"
        draft.error("missing-path", place, f"there is no file `{said}`", help=help)
        return token
    header = header_of(path)
    if header is None or not _sizes(header, family, token):
        names = [key or token.token for key in family.embedding_keys.values()]
        draft.error(
            "bad-adapter",
            place,
            f"`{said}` holds no vectors of `{token.token}`",
            help=f"it should hold `{'` and `'.join(names)}`, as a run's result does",
        )
        return token
    return _held(draft, family, where, token, path, header)


def _held(
    draft: Draft,
    family: FamilyCard,
    where: KeyPath,
    token: plan.NewToken,
    path: Path,
    header: Header,
) -> plan.NewToken:
    sizes = _sizes(header, family, token)
    if sizes != {token.vectors}:
        told = " and ".join(map(str, sorted(sizes)))
        draft.error(
            "bad-adapter",
            (*where, "vectors"),
            f"`{path.name}` has {told} vectors of `{token.token}`, the recipe {token.vectors}",
            help=f"vectors = {max(sizes)}",
        )
    if token.initial:
        draft.warn(
            "no-effect",
            (*where, "initial"),
            f"`{token.token}` starts from the vectors in {path.name}",
            help="leave `initial` out",
            of="key",
        )
    digest = hashlib.sha256(header.text + str(path.stat().st_size).encode()).hexdigest()
    return evolve(token, start=str(path), start_digest=digest)


def _sizes(header: Header, family: FamilyCard, token: plan.NewToken) -> set[int]:
    """How many vectors the file holds of the word, of each encoder; empty unless of all."""
    found = []
    for key in family.embedding_keys.values():
        shapes = [header.shapes[k] for k in vector_keys(key, token.token) if k in header.shapes]
        if not shapes or not shapes[0]:
            return set()
        found.append(shapes[0][0] if len(shapes[0]) > 1 else 1)
    return set(found)
