"""`tuner plan`: say what a run would do. Writes nothing to disk but what the caches hold."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from compiler.home import default_cache
from tuner.exits import DONE, REFUSED
from tuner.screen import err, out, style_for
from tuner.simulations import SIMULATIONS, Planning


def show_plan(
    recipe: Path,
    overrides: Sequence[str],
    *,
    as_json: bool = False,
    verbose: bool = False,
    strict: bool = False,
    explain: str = "",
    device: str = "",
) -> int:
    """The plan on stdout, diagnostics on stderr (in the JSON object with `as_json`).

    `device` names one that is not here, or its memory. With `explain`, a key of the recipe, only
    what the plan knows of that key.
    """
    planning = Planning(default_cache() / SIMULATIONS, recipe, [*overrides, device])
    with planning.simulator() as simulator:  # imports libraries while this process imports ours
        from tuner.compiling import compile_here, exit_code, judged, show_diagnostics
        from tuner.elsewhere import UnknownDevice

        try:
            compiled = compile_here(recipe, overrides, simulator=simulator, device=device)
        except UnknownDevice as error:
            err(f"error: {error}")
            return REFUSED
    if compiled.plan is not None:
        planning.done()
    diagnostics = judged(compiled, strict=strict)
    code = exit_code(diagnostics)
    plan = compiled.plan if code == DONE else None
    if explain:
        from tuner.plan_explain import explain_key

        if plan is None and not as_json:
            show_diagnostics(diagnostics, compiled, str(recipe))
        found = explain_key(
            compiled.decisions(), explain, whole=compiled.plan is not None, as_json=as_json
        )
        return found or code
    if as_json:
        from tuner.plan_json import json_object

        out(json.dumps(json_object(plan, diagnostics, compiled.outlook, compiled.texts), indent=2))
        return code
    show_diagnostics(diagnostics, compiled, str(recipe))
    if plan is not None:
        from tuner.plan_view import decorated, text

        style = style_for(sys.stdout)
        out(
            decorated(
                text(plan, recipe=str(recipe), verbose=verbose, outlook=compiled.outlook), style
            )
        )
    return code
