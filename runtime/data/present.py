"""What of a plan's encodings is cached already. Opens no picture, writes nothing, needs no torch.

An entry is known to be there or not only where the hash of the file is remembered and the file is
unchanged since; of all others it is said that nobody knows.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from compiler.data.manifest import Manifest
from compiler.data.prompts import prompts_of
from compiler.hub import model_folder
from compiler.plan import Model, Plan
from compiler.site import Counted
from runtime.data.hashes import known_hashes
from runtime.data.keys import known_latent_keys, known_mask_names, known_text_keys
from runtime.data.store import INDEX, SHARDS, CacheDamaged, Store

MOST = 50_000
"""Pictures that are looked at: of more, the rest counts as unknown."""


def cached(plan: Plan, manifest: Manifest) -> tuple[Counted, Counted]:
    """(embeddings, latents): how many there are to be, are cached, and are not known of."""
    judged = manifest.held_out
    texts = len(prompts_of(plan, manifest))
    latents = len(manifest) + (len(judged) if judged else 0)
    path = Path(plan.cache_folder) / INDEX
    if not path.exists():
        return _none(texts), _none(latents)
    folder = _base(plan.model)
    if folder is None:
        return _unknown(texts), _unknown(latents)
    try:
        with closing(Store(path, traceless=True)) as store:
            pictures = _latents(plan, manifest, folder, store)
            if judged is not None:
                pictures = _sum(pictures, _latents(plan, judged, folder, store))
            return _texts(plan, manifest, folder, store), pictures
    except (CacheDamaged, OSError):
        return _unknown(texts), _unknown(latents)


def _none(total: int) -> Counted:
    return Counted(total=total, cached=0, unknown=0)


def _sum(one: Counted, other: Counted) -> Counted:
    return Counted(
        total=one.total + other.total,
        cached=one.cached + other.cached,
        unknown=one.unknown + other.unknown,
    )


def _unknown(total: int) -> Counted:
    return Counted(total=total, cached=0, unknown=total)


def _base(model: Model) -> Path | None:
    """The folder of the base; None where it has not been downloaded."""
    if model.local:
        return Path(model.base)
    if not model_folder(model.base).is_dir():
        return None
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(model.base, revision=model.revision or None, local_files_only=True)
        )
    except (OSError, ValueError):
        return None


def _texts(plan: Plan, manifest: Manifest, folder: Path, store: Store) -> Counted:
    wanted = prompts_of(plan, manifest)
    keys = known_text_keys(plan, folder, store)
    if keys is None:
        return _unknown(len(wanted))
    names = [keys.key(prompt.text, negative=prompt.negative) for prompt in wanted]
    return Counted(total=len(wanted), cached=len(_there(store, names)), unknown=0)


def _latents(plan: Plan, manifest: Manifest, folder: Path, store: Store) -> Counted:
    total, looked = len(manifest), min(len(manifest), MOST)
    keys = known_latent_keys(plan, folder, store)
    if keys is None:
        return _unknown(total)
    contents = known_hashes(store, [manifest.item(row) for row in range(looked)])
    masks = known_mask_names(plan, manifest, store, looked)
    names = [
        keys.key(content, manifest.placement(row), mask)
        for row, (content, mask) in enumerate(zip(contents, masks, strict=True))
        if content is not None and mask is not None
    ]
    there = _there(store, names)
    return Counted(
        total=total, cached=sum(name in there for name in names), unknown=total - len(names)
    )


def _there(store: Store, names: Sequence[bytes]) -> set[bytes]:
    """Those that have an entry in a shard that is whole."""
    query = "SELECT key, shard FROM entries WHERE key IN (?)"
    found = dict(store.rows(query, sorted(set(names))))
    whole = _whole(store, sorted(set(found.values())))
    return {name for name, shard in found.items() if shard in whole}


def _whole(store: Store, shards: Sequence[int]) -> set[int]:
    """The shards whose file has its full length."""
    folder = store.path.parent / SHARDS
    rows = store.rows("SELECT id, name, bytes FROM shards WHERE id IN (?)", shards)
    return {number for number, name, size in rows if _size(folder / name) == size}


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1
