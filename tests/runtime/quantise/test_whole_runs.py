"""Whole runs with every component quantised: killed, gone on with, and compared."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest
from attrs import evolve

from compiler.data.manifest import Manifest
from compiler.plan import Plan, Quantisation
from runtime.data.cache import Cache
from runtime.data.keys import latent_keys, text_keys
from runtime.families import family_of
from tests.runtime.plans import LORA, PICTURES, draw_data, tiny_plan
from tests.runtime.run_plan import Interrupting, run
from tests.runtime.whole_runs import MIXED, NEVER, assert_equal, fork, wait

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="forks and POSIX signals")


def planned(
    family: str, base: Path, folder: Path, name: str, kind: Quantisation
) -> tuple[Plan, Manifest]:
    plan, manifest = tiny_plan(
        family,
        base,
        folder / "pictures",
        folder / name,
        steps=5,
        every=2,
        adapter=evolve(LORA, dropout=0.2),
        precision=MIXED,
        validation=PICTURES,
    )
    parts = tuple(
        evolve(
            part,
            dtype="bfloat16" if part.name != "vae" else "float32",
            quantize=kind if part.name.startswith(("text_encoder", "transformer")) else "none",
        )
        for part in plan.model.components
    )
    return evolve(plan, model=evolve(plan.model, components=parts)), manifest


@pytest.mark.parametrize(("family", "kind"), [("sana", "nf4"), ("sd3", "int8")])
def test_a_killed_run_goes_on_to_the_same_weights(
    family: str, kind: Quantisation, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    base: Path = request.getfixturevalue(f"tiny_{family}")
    draw_data(tmp_path / "pictures")
    whole, manifest = planned(family, base, tmp_path, "whole", kind)
    assert run(whole, manifest, Interrupting(*NEVER)) == 0
    parts, _ = planned(family, base, tmp_path, "parts", kind)
    at = Interrupting("step", 3, signal.SIGKILL)
    assert wait(fork(lambda: run(parts, manifest, at))) == -signal.SIGKILL
    assert run(parts, manifest, Interrupting(*NEVER)) == 0
    assert_equal(whole, parts)


def test_embeddings_of_quantised_encoders_are_others(tiny_sana: Path, tmp_path: Path) -> None:
    draw_data(tmp_path / "pictures")
    plans = [planned("sana", tiny_sana, tmp_path, "run", kind)[0] for kind in ("none", "int8")]
    family, cache = family_of("sana"), Cache(tmp_path / "cache")
    assert text_keys(plans[0], family, cache).base != text_keys(plans[1], family, cache).base
    assert latent_keys(plans[0], family, cache) == latent_keys(plans[1], family, cache)
