"""Who may import whom: tuner -> runtime -> compiler, and nothing heavy outside the runtime."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = {"torch", "diffusers", "transformers", "peft", "accelerate", "torchao", "safetensors"}
SLOW = {"numpy", "PIL", "rich"}  # fine inside a function, not when a module is imported


def imports(path: Path, *, deep: bool) -> Iterator[tuple[str, int]]:
    """(top-level package, line) of each import; not `deep`: only those run on import."""
    waiting: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield str(node.module).split(".")[0], node.lineno
        function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if deep or not (function or _only_for_types(node)):
            waiting += ast.iter_child_nodes(node)


def _only_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def offences(room: str, banned: set[str], *, deep: bool) -> list[str]:
    files = sorted((ROOT / room).rglob("*.py"))
    assert files, f"no files in {room}"
    return [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in files
        for name, line in imports(path, deep=deep)
        if name in banned
    ]


def test_the_compiler_imports_nothing_heavy_and_neither_room_above() -> None:
    assert offences("compiler", HEAVY | {"runtime", "tuner"}, deep=True) == []


def test_the_compiler_imports_slow_packages_only_inside_functions() -> None:
    assert offences("compiler", SLOW, deep=False) == []


def test_the_runtime_never_imports_the_command_line() -> None:
    assert offences("runtime", {"tuner", "typer", "rich"}, deep=True) == []


def test_the_command_line_leaves_models_to_the_runtime() -> None:
    assert offences("tuner", HEAVY, deep=True) == []


def test_the_guard_sees_an_import_wherever_it_stands(tmp_path: Path) -> None:
    path = tmp_path / "x.py"
    path.write_text("import json\ndef f():\n    from torch.nn import functional\n    return 1\n")
    assert sorted(imports(path, deep=True)) == [("json", 1), ("torch", 3)]
    assert list(imports(path, deep=False)) == [("json", 1)]


def loaded(code: str) -> set[str]:
    """Top-level packages and modules in memory after `code` in a fresh process."""
    tail = "\nimport json as j, sys as s\nprint('\\n' + j.dumps(sorted(s.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code + tail], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_a_fresh_process_that_imports_all_of_the_compiler_has_nothing_heavy() -> None:
    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in sorted((ROOT / "compiler").rglob("*.py"))
        if path.name != "__init__.py"
    ]
    modules = loaded("\n".join(f"import {name}" for name in names))
    assert modules & (HEAVY | SLOW | {"runtime", "tuner", "pydantic"}) == set()
    assert "compiler.plan" in modules


@pytest.mark.parametrize(
    "module",
    [
        "runtime.checkup",
        "runtime.errors",
        "runtime.events",
        "runtime.machine",
        "runtime.quiet",
        "runtime.site",
    ],
)
def test_what_plan_and_doctor_need_of_the_runtime_is_light(module: str) -> None:
    assert loaded(f"import {module}") & (HEAVY | SLOW) == set()
