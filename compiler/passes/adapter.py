"""The adapter: its kind and sizes, what it is put on, and what it starts from."""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Iterator, Mapping
from math import gcd
from pathlib import Path
from typing import Any

from attrs import evolve, fields

from compiler.adapters import (
    ADAPTERS,
    COMMON,
    INVERSION,
    LORAS,
    OF_THE_BASE,
    AdapterFacts,
    rank_of,
)
from compiler.diagnostics import choices
from compiler.draft import Draft
from compiler.families import FAMILIES
from compiler.families.card import FamilyCard
from compiler.passes.start_family import other_family
from compiler.plan import Adapter, Ranked, Scaled
from compiler.safetensors import Header, header_of
from compiler.schema import AdapterRecipe
from compiler.spans import KeyPath

WHERE: KeyPath = ("adapter",)
BLOCK_SIZES = {"oft": 32, "boft": 8}
RANKS_AT_ONCE = 4  # of DyLoRA, as LyCORIS has it


def resolve_adapter(draft: Draft, family: FamilyCard) -> Adapter | None:
    """The plan's adapter; None for a full fine-tune."""
    recipe = draft.recipe.adapter
    if recipe is None:
        return None
    row = ADAPTERS[recipe.kind]
    _judge_keys(draft, row)
    if recipe.kind == INVERSION:
        draft.decide((*WHERE, "kind"), recipe.kind)
        return Adapter(kind=recipe.kind, rank=0, alpha=0.0, dropout=0.0, init="", targets=())
    made = Adapter(
        kind=recipe.kind,
        rank=recipe.rank if row.ranked else 0,
        alpha=0.0,
        dropout=recipe.dropout,
        init=recipe.init if row.inits else "",
        targets=_targets(draft, family),
        exclude=recipe.exclude,
        min_rank=(recipe.min_rank or 0) if "min_rank" in row.keys else 0,
        ranks=tuple(Ranked(pattern=p, rank=r) for p, r in recipe.ranks.items()),
        scaling=recipe.scaling,
        rank_dropout=recipe.rank_dropout,
        module_dropout=recipe.module_dropout,
        factor=recipe.factor or 0,
        decompose_both=recipe.decompose_both,
        full_matrix=recipe.full_matrix,
        tucker=recipe.tucker,
        weight_decompose=recipe.weight_decompose,
        train_norm=recipe.train_norm,
        block_size=_block_size(recipe, row),
        block_share=recipe.block_share,
        butterfly_factors=recipe.butterfly_factors if recipe.kind == "boft" else 0,
    )
    made = _with_alphas(recipe, made) if row.ranked else made
    for key in ("exclude", "ranks", "alphas"):
        _check_patterns(draft, (*WHERE, key), getattr(recipe, key))
    _record(draft, row, made)
    _judge_start(draft, made)
    _judge_blocks(draft, made)
    _judge_min_rank(draft, made)
    return _with_file(draft, family, made)


def _block_size(recipe: AdapterRecipe, row: AdapterFacts) -> int:
    """What is rotated together, or of DyLoRA trained together; 0 of kinds without blocks."""
    if "block_size" not in row.keys:
        return 0
    usual = BLOCK_SIZES.get(row.kind, gcd(RANKS_AT_ONCE, recipe.rank, *recipe.ranks.values()))
    return recipe.block_size or usual


def _with_alphas(recipe: AdapterRecipe, made: Adapter) -> Adapter:
    """Where alpha is open it follows the rank, pattern by pattern."""
    alpha = float(made.rank) if recipe.alpha == "auto" else float(recipe.alpha)
    alphas = [Scaled(pattern=p, alpha=float(a)) for p, a in recipe.alphas.items()]
    if recipe.alpha == "auto":
        alphas += [Scaled(pattern=r.pattern, alpha=float(r.rank)) for r in made.ranks]
    return evolve(made, alpha=alpha, alphas=tuple(alphas))


def _record(draft: Draft, row: AdapterFacts, made: Adapter) -> None:
    """A decision for each key that the kind has."""
    draft.decide((*WHERE, "kind"), made.kind)
    for key in row.keys:
        if key in ("ranks", "alphas"):
            continue
        value = getattr(made, key)
        if key == "alpha":
            why = "alpha = rank, so the scale is 1"
            draft.decide((*WHERE, key), value, by="decided", why=why)
        elif key == "min_rank" and not value:
            draft.decide((*WHERE, key), "rank", why="the rank is the same at all noise levels")
        elif key == "block_size" and row.ranked:
            why = f"the largest up to {RANKS_AT_ONCE} by which all ranks divide"
            draft.decide((*WHERE, key), value, by="decided", why=why)
        elif key == "factor" and not value:
            draft.decide((*WHERE, key), "root", why="both numbers near to the root of the edge")
        else:
            draft.decide((*WHERE, key), value)


def _judge_keys(draft: Draft, row: AdapterFacts) -> None:
    common = COMMON[:1] if row.kind == INVERSION else COMMON
    for field in fields(AdapterRecipe):
        key = str(field.metadata.get("key", field.name))
        if draft.given((*WHERE, key)) and key not in (*common, *row.keys):
            draft.error(
                "no-effect",
                (*WHERE, key),
                f"an adapter of kind `{row.kind}` takes no `{key}`",
                help=f"it takes {choices((*common[1:], *row.keys))}"
                if row.kind != INVERSION
                else "see [embeddings] for what it learns",
                of="key",
            )


def _judge_start(draft: Draft, made: Adapter) -> None:
    row, where = ADAPTERS[made.kind], (*WHERE, "init")
    if draft.recipe.adapter is None or not row.inits:
        return
    if made.init not in row.inits:
        draft.error(
            "conflict",
            where,
            f"an adapter of kind `{made.kind}` can't start as `{made.init}`",
            help=f"it can start as {choices(row.inits)}",
        )
    elif made.init in OF_THE_BASE:
        _judge_base(draft, made.init)
    ranks = [((*WHERE, "rank"), made.rank)]
    ranks += [((*WHERE, "ranks", rule.pattern), rule.rank) for rule in made.ranks]
    for place, rank in ranks if made.init == "orthogonal" else ():
        if rank % 2:
            message = f"an orthogonal start halves the rank, which {rank} does not allow"
            draft.error("conflict", place, message, help=f"say {rank + 1}, or another `init`")


def _judge_base(draft: Draft, init: str) -> None:
    """What can't be where a part of the base's weights moves to the adapter."""
    where = (*WHERE, "init")
    if draft.trained.quantize not in ("none", "auto"):
        draft.error(
            "conflict",
            where,
            f"`{init}` takes over weights of the base, and quantised ones don't give them exactly",
            help='leave out `quantize`, or take init = "gaussian"',
        )
    for source in draft.recipe.data.source:
        if source.regularisation is not None and source.regularisation.target == "base":
            draft.error(
                "conflict",
                where,
                f'with `{init}` the base alone is not what it was, so target = "base" has no base '
                "to ask",
                help='take init = "gaussian", or target = "image"',
            )
            return


def _judge_min_rank(draft: Draft, made: Adapter) -> None:
    """Whether there is a rank to mask, and a start that is one; and that others mask none."""
    if not made.min_rank:
        return
    where, least = (*WHERE, "min_rank"), min([made.rank, *(rule.rank for rule in made.ranks)])
    if made.min_rank >= least:
        message = f"a least rank of {made.min_rank} leaves nothing to grow in a rank of {least}"
        draft.error("conflict", where, message, help=f"say less than {least}, or leave it out")
    elif made.init not in ("gaussian", "kaiming"):
        message = f"what starts as `{made.init}` changes the model wherever a part of it is masked"
        draft.error("conflict", where, message, help='take init = "gaussian"')
    else:
        draft.warn(
            "rank-by-noise",
            where,
            "programs that load the LoRA have all ranks at all noise levels, which this run does "
            "not train: its own pictures show the LoRA as it is trained",
            help="docs/files.md tells how to draw like that with Diffusers",
        )


def _judge_blocks(draft: Draft, made: Adapter) -> None:
    if made.kind == "dylora":
        _judge_rank_blocks(draft, made)
    elif made.block_size == 1:
        message = "blocks of one input can't be rotated"
        draft.error("out-of-range", (*WHERE, "block_size"), message, help="say 2 at least")
    if made.kind == "boft" and made.butterfly_factors > 1 and made.block_size % 2:
        draft.error(
            "conflict",
            (*WHERE, "block_size"),
            f"blocks of {made.block_size} can't be halved, as `butterfly_factors` needs",
            help="give an even `block_size`, or leave out `butterfly_factors`",
        )


def _judge_rank_blocks(draft: Draft, made: Adapter) -> None:
    """Whether DyLoRA's blocks divide its ranks, and leave something to draw."""
    where, ranks = (*WHERE, "block_size"), (made.rank, *(rule.rank for rule in made.ranks))
    for rank in ranks:
        if rank % made.block_size:
            draft.error(
                "conflict",
                where,
                f"a rank of {rank} can't be cut into blocks of {made.block_size}",
                help=f"say {_block_of(made.block_size, *ranks)}, or ranks that are multiples of "
                f"{made.block_size}",
            )
            return
    if made.block_size == max(ranks):
        draft.warn(
            "no-effect",
            where if draft.given(where) else (*WHERE, "rank"),
            f"with one block of {made.block_size} every step trains the whole rank, as a LoRA does",
            help='say fewer, or take kind = "lora"',
        )


def _block_of(size: int, *ranks: int) -> int:
    """A block near `size` that divides all `ranks` and is less than the largest, if that can be."""
    common = gcd(size, *ranks)
    if common < max(ranks):
        return common
    return next((part for part in range(common // 2, 0, -1) if common % part == 0), common)


def _targets(draft: Draft, family: FamilyCard) -> tuple[str, ...]:
    assert draft.recipe.adapter is not None
    asked = draft.recipe.adapter.targets
    where = (*WHERE, "targets")
    if asked == "auto":
        draft.decide(where, family.default_targets, by=f"family {family.name}")
        return family.target_sets[family.default_targets]
    draft.decide(where, asked)
    if isinstance(asked, tuple):
        _check_patterns(draft, where, asked)
        if not asked:
            draft.error("no-targets", where, "an adapter without targets trains nothing")
        return asked
    if asked in family.target_sets:
        return family.target_sets[asked]
    if _check_pattern(draft, where, asked):
        return (asked,)
    return ()


def _check_patterns(draft: Draft, where: KeyPath, patterns: Any) -> None:
    """Of a list, or of the keys of a table."""
    for number, pattern in enumerate(patterns):
        part = pattern if isinstance(patterns, dict) else number
        _check_pattern(draft, (*where, part), pattern)


def _check_pattern(draft: Draft, where: KeyPath, pattern: str) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # of what a later Python will read otherwise, as `[[`
            re.compile(pattern)
    except (re.error, RecursionError, OverflowError, Warning) as error:
        named = where[1] == "targets"
        sets = tuple(FAMILIES[draft.recipe.model.family].target_sets)
        draft.error(
            "bad-pattern",
            where,
            f"`{pattern}` is {'neither a named set nor' if named else 'not'} a valid pattern: "
            f"{error}",
            help=f"named sets: {choices(sets)}" if named else "patterns are regular expressions",
        )
        return False
    return True


def _with_file(draft: Draft, family: FamilyCard, made: Adapter) -> Adapter:
    """With the file to start from, whose header must be of such an adapter."""
    assert draft.recipe.adapter is not None
    said, where = draft.recipe.adapter.from_, (*WHERE, "from")
    if not said:
        return made
    begun, made = made.init, evolve(made, init=_from_init(made))
    init = draft.given((*WHERE, "init"))
    path = _file(draft.folder, said, made)
    header = None if path is None else header_of(path)
    if path is None:
        help = "an adapter's safetensors file, or a folder that holds one, relative to the recipe"
        draft.error("missing-path", where, f"there is no file `{said}`", help=help)
    elif header is None:
        message = f"`{said}` is no safetensors file, so no adapter is in it"
        draft.error("bad-adapter", where, message, help="name the file of an adapter")
    else:
        problem = _mismatch(header, family.trained_component, made)
        if draft.model is not None and (other := other_family(header, draft.model)):
            message = f"`{said}` is an adapter of another family: {other}"
            draft.error("bad-adapter", where, message, help=f"take one of {family.title}")
        elif problem:
            help = _right_rank(header, family.trained_component, made)
            if help and init:  # one mistake, one message
                why = f": what starts as {begun} leaves twice its rank" * (begun in OF_THE_BASE)
                help, init = f"{help}, and leave `init` out{why}", False
            draft.error("bad-adapter", where, f"`{said}` does not fit: {problem}", help=help)
        digest = hashlib.sha256(header.text + str(path.stat().st_size).encode()).hexdigest()
        made = evolve(made, start=str(path), start_digest=digest)
    if init:
        message = "an adapter that starts from a file is not initialised"
        draft.error("no-effect", (*WHERE, "init"), message, help="leave `init` out", of="key")
    return made


def _from_init(made: Adapter) -> str:
    """Nothing is taken from the base then."""
    return "gaussian" if made.init in OF_THE_BASE else made.init


def _file(folder: Path, said: str, made: Adapter) -> Path | None:
    try:
        path = (folder / Path(said).expanduser()).resolve()
        path = path / ADAPTERS[made.kind].file if path.is_dir() else path
        return path if path.is_file() else None
    except (OSError, ValueError, RuntimeError):
        return None


FIRST = ("lora_A", "lora_down")
LENGTHS = ("lora_magnitude_vector", "dora_scale")
PARTS: Mapping[str, tuple[str, ...]] = {
    "lora": FIRST,
    "dora": FIRST,
    "dylora": FIRST,
    "lokr": ("lokr_w",),
    "loha": ("hada_w1_b",),
    "glora": ("a2.weight",),
    "ia3": ("ia3_l",),
    "full": ("diff",),
    "oft": ("oft_R",),
    "boft": ("boft_R",),
}
"""A part of each kind's tensors by which its files are known: as we call it, and as others do."""
FOREIGN = re.compile(r"lora_(unet|transformer)_|lycoris_|diffusion_model\.")
"""How other programs' names of modules begin."""
SHARED = re.compile(r"qkv|linear1")
"""In other programs' names: a layer that up to four of Diffusers' share."""


def _mismatch(header: Header, component: str, made: Adapter) -> str:
    """Why the file can't be the start of such an adapter; "" if it can."""
    parts, title = PARTS[made.kind], ADAPTERS[made.kind].title
    shapes = {name: shape for name, shape in header.shapes.items() if _has(name, parts)}
    if not shapes:
        return f"it holds no {title} (no tensor is called `{'` or `'.join(parts)}`)"
    magnitudes = any(_has(name, LENGTHS) for name in header.shapes)
    if made.kind in LORAS and magnitudes != (made.kind == "dora"):
        return "it is a DoRA" if magnitudes else "it is a LoRA without magnitudes"
    if "train_norm" in ADAPTERS[made.kind].keys:
        norms = any(name.endswith(".w_norm") for name in header.shapes)
        if norms != made.train_norm:
            return f"it holds {'' if norms else 'no '}norms; the recipe has " + (
                f"train_norm = {str(made.train_norm).lower()}"
            )
    if "weight_decompose" in ADAPTERS[made.kind].keys and magnitudes != made.weight_decompose:
        held = "has lengths of rows apart" if magnitudes else "has no lengths of rows apart"
        return f"it {held}; the recipe has weight_decompose = {str(made.weight_decompose).lower()}"
    for name, found, wanted in _sizes(shapes, component, made):
        if found not in ([wanted * n for n in range(1, 5)] if SHARED.search(name) else [wanted]):
            word = "rank" if ADAPTERS[made.kind].ranked else "block size"
            return f"`{name}` is of {word} {found}, the recipe's is {wanted}"
    return ""


def _right_rank(header: Header, component: str, made: Adapter) -> str:
    """What of the recipe would fit the ranks or block sizes of the file; "" if that is not all."""
    parts = PARTS[made.kind]
    shapes = {name: shape for name, shape in header.shapes.items() if _has(name, parts)}
    sizes = [row for row in _sizes(shapes, component, made) if not SHARED.search(row[0])]
    found = {size for _, size, _ in sizes}
    ranked = ADAPTERS[made.kind].ranked
    if len(found) == 1:
        size = found.pop()
        if _mismatch(header, component, evolve(made, rank=size, block_size=size, ranks=())):
            return ""
        without = ", without `ranks`" * bool(made.ranks)
        return f"{'rank' if ranked else 'block_size'} = {size}{without}"
    doubled = bool(sizes) and all(size == 2 * wanted for _, size, wanted in sizes)
    return "twice the `rank` and twice each of `ranks`" if ranked and doubled else ""


def _sizes(
    shapes: Mapping[str, tuple[int, ...]], component: str, made: Adapter
) -> Iterator[tuple[str, int, int]]:
    """Of each of the file's tensors that tell it: its name, its rank or block size, and the
    recipe's."""
    for name, shape in shapes.items():
        if name.startswith(("text_encoder", "lora_te")):  # see `passes.text_training`
            continue
        module = re.split(rf"\.(?:{'|'.join(PARTS[made.kind])})", name)[0]
        found, wanted = (
            _size(made, name, shape),
            _wanted(made, module.removeprefix(f"{component}.")),
        )
        if found is not None and wanted is not None:
            yield name, found, wanted


def _has(name: str, parts: tuple[str, ...]) -> bool:
    return any(f".{part}" in name for part in parts)


def _size(made: Adapter, name: str, shape: tuple[int, ...]) -> int | None:
    """Rank or block size, by the shape of a tensor; None where it does not tell."""
    if made.kind == "lokr":
        return shape[0] if name.endswith("lokr_w2_b") and shape else None
    if made.kind == "oft":  # b (b - 1) / 2 numbers a block
        count = shape[-1] if shape else 0
        return int((1 + (1 + 8 * count) ** 0.5) / 2)
    if made.kind == "boft":
        return shape[-1] if shape else 0
    if not ADAPTERS[made.kind].ranked:
        return None
    return shape[0] if shape else 0


def _wanted(made: Adapter, module: str) -> int | None:
    if not ADAPTERS[made.kind].ranked:
        return made.block_size
    if made.kind in LORAS and not FOREIGN.match(module):
        return rank_of(made, module)
    return None if made.ranks else made.rank  # their names don't tell dots from underscores
