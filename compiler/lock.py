"""`plan.lock.toml`: a plan as text, and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cattrs import Converter

from compiler.optimizers import OPTIMIZERS
from compiler.plan import NOT_IN_DIGEST, PLAN_FORMAT, Plan, alters_trajectory, plain

HEADER = """\
# What this run does, resolved to the last value. Written by tuner; `tuner run` accepts it as it is.
"""


class LockError(Exception):
    """The text is no plan that this version can run; the message says why."""


def dumps(plan: Plan) -> str:
    """The plan as TOML."""
    import tomli_w

    return f'{HEADER}digest = "{plan.digest}"\n{tomli_w.dumps(plain(plan))}'


def loads(text: str) -> Plan:
    """The plan from TOML.

    Raises:
        LockError: not TOML, another format, or a value that does not fit.
    """
    import tomllib

    try:
        data = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise LockError(f"not valid TOML: {error}") from error
    data.pop("digest", None)
    if data.get("format") != PLAN_FORMAT:
        raise LockError(
            f"plan format {data.get('format')!r}; this version runs format {PLAN_FORMAT}: "
            "plan the recipe again"
        )
    return _structure(data)


def read(path: Path) -> Plan:
    """The plan in the file at `path`.

    Raises:
        LockError: it can't be read, or is no plan.
    """
    try:
        return loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise LockError(str(error)) from error


def _structure(data: dict[str, Any]) -> Plan:
    converter = Converter(forbid_extra_keys=True, detailed_validation=False)
    converter.register_structure_hook(Any, lambda value, _: value)
    try:
        return converter.structure(data, Plan)
    except Exception as error:
        raise LockError(f"a value does not fit: {error or type(error).__name__}") from error


def alters(plan: Plan, key: str) -> bool:
    """Whether a plan that differs from `plan` at the dotted `key` trains other weights.

    Threads share out the sums of a processor, so their number matters where it computes.
    """
    if key == "threads":
        on_host = plan.sharing.offload_optimizer or OPTIMIZERS[plan.optimizer.name].host_bytes > 0
        return plan.device == "cpu" or on_host
    return alters_trajectory(key)


def differences(old: Plan, new: Plan) -> list[tuple[str, str, str]]:
    """(key, old value, new value) of everything that differs, in the plan's own order."""
    return [(key, str(left), str(right)) for key, left, right in changes(old, new)]


def changes(old: Plan, new: Plan) -> list[tuple[str, Any, Any]]:
    """The same with the values themselves; None where a plan has no such entry.

    Entries of lists are paired by what names them (`sources[dog]`, `buckets[dog 64x64]`), the
    configurations of components by their keys.
    """
    found: list[tuple[str, Any, Any]] = []
    _compare("", _compared(old), _compared(new), found)
    return found


def _compared(plan: Plan) -> dict[str, Any]:
    """A plan as plain data, without what its digest leaves out, configurations as tables."""
    tree = {key: value for key, value in plain(plan).items() if key not in NOT_IN_DIGEST}
    configs = {name: json.loads(text) for name, text in plan.model.configs.items()}
    return tree | {"model": tree["model"] | {"configs": configs}}


def _compare(path: str, old: Any, new: Any, found: list[tuple[str, Any, Any]]) -> None:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            below = f"{path}.{key}" if path else key
            _compare(below, old.get(key), new.get(key), found)
        return
    left, right = _named(old), _named(new)
    if left is not None and right is not None:
        for name in [*left, *(name for name in right if name not in left)]:
            _compare(f"{path}[{name}]", left.get(name), right.get(name), found)
    elif old != new:
        found.append((path, old, new))


def _named(rows: Any) -> dict[str, Any] | None:
    """Tables of a list by what names them; None where it holds no tables that have a name."""
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        return None
    names = [row.get("id") or row.get("name") or _bucket(row) for row in rows]
    return dict(zip(names, rows, strict=True)) if len(set(names)) == len(rows) else None


def _bucket(row: dict[str, Any]) -> str:
    return f"{row.get('source')} {row.get('width')}x{row.get('height')}"
