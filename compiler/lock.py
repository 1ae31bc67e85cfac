"""`plan.lock.toml`: a plan as text, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cattrs import Converter

from compiler.plan import NOT_IN_DIGEST, PLAN_FORMAT, Plan, plain

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


def differences(old: Plan, new: Plan) -> list[tuple[str, str, str]]:
    """(key, old value, new value) of everything that differs, in the plan's own order."""
    found: list[tuple[str, str, str]] = []
    _compare("", plain(old), plain(new), found)
    return [row for row in found if row[0].split(".")[0].split("[")[0] not in NOT_IN_DIGEST]


def _compare(path: str, old: Any, new: Any, found: list[tuple[str, str, str]]) -> None:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            below = f"{path}.{key}" if path else key
            _compare(below, old.get(key), new.get(key), found)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (left, right) in enumerate(zip(old, new, strict=True)):
            _compare(f"{path}[{index}]", left, right, found)
    elif old != new:
        found.append((path, str(old), str(new)))
