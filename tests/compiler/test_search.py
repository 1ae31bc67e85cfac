"""Which settings are chosen of all that there are: against brute force, and over many budgets."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path

import pytest
from attrs import evolve, frozen

from compiler.draft import Draft
from compiler.memory import Candidate, Simulation
from compiler.passes import memory
from compiler.passes.estimates import altered
from compiler.passes.ladder import Rung
from compiler.passes.modelled_time import clock
from compiler.passes.search import FINEST, STEP, Search
from compiler.plan import Phase, digest_of
from tests.compiler.recipes import GPU, RECIPE, compiled, project
from tests.compiler.test_ladder import OPEN, Formula

MIB = 2**20
BITS = {"none": 1.0, "int8": 0.52, "nf4": 0.28}
FUSABLE = "[train]\nmax_grad_norm = 0.0\n"


@frozen(kw_only=True)
class Sizes:
    """Memory by a formula of a few sizes (MiB); `noise` is by how much each rung is off it."""

    weights: int
    state: int
    sample: int  # activations of one
    gradients: int
    kept: float  # of a recomputed block's activations
    aside: float  # of activations on the host, what stays on the device
    noise: float = 0.0
    seed: int = 0

    def simulate(self, candidate: Candidate) -> Simulation:
        """See `MemoryModel.simulate`."""
        layout = candidate.layout
        part = next(c for c in candidate.model.components if c.name == "transformer")
        blocks = 0.9 * self.weights * BITS[part.quantize]  # all that is quantised
        weights = 0.1 * self.weights + blocks
        moved = blocks * layout.offload_blocks / 28
        every = layout.activation_checkpointing
        share = 1 - (1 - self.kept) / every if every else 1.0
        size = candidate.micro_batch or max(count for *_, count in candidate.shapes)
        activations = self.sample * size * share
        crossing = activations * (1 - self.aside) if layout.offload_activations else 0.0
        state = self.state / 4 if "8bit" in candidate.optimizer.name else self.state
        gradients = 0 if layout.fused_backward else self.gradients
        off = self._off(candidate)
        train = {
            "weights": round(off * (weights - moved) * MIB),
            "activations": round(off * (activations - crossing) * MIB),
            "optimizer": round(off * state * MIB),
            "gradients": round(off * gradients * MIB),
        }
        update = {**train, "activations": 0}
        host = round(off * (moved + crossing) * MIB)
        return Simulation(
            phases=(
                _phase("train", train, host),
                _phase("update", update, host),
                _phase("save", {"weights": train["weights"]}, host),
            ),
            parameters=2 * 10**9,
            trainable=10**6,
            adapted_modules=10,
            flops=round(10**12 * self.sample * (1 + (1 / every / 3 if every else 0))),
            blocks_waiting=round(off * moved * MIB),
            activations_waiting=round(off * crossing * MIB),
            seconds=0.0,
        )

    def _off(self, candidate: Candidate) -> float:
        what = [self.seed, candidate.layout, candidate.optimizer.name, candidate.micro_batch]
        kinds = [part.quantize for part in candidate.model.components]
        drawn = random.Random(digest_of([str(each) for each in (*what, kinds)]))
        return drawn.uniform(1 - self.noise, 1 + self.noise)


def _phase(name: str, parts: dict[str, int], host: int) -> Phase:
    return Phase(name=name, device_bytes=sum(parts.values()), host_bytes=host, parts=parts)


def sizes(seed: int, noise: float = 0.0) -> Sizes:
    drawn = random.Random(seed)
    return Sizes(
        weights=drawn.randint(200, 20000),
        state=drawn.randint(10, 2000),
        sample=drawn.randint(100, 8000),
        gradients=drawn.randint(5, 500),
        kept=drawn.uniform(0.02, 0.3),
        aside=drawn.uniform(0.02, 0.4),
        noise=noise,
        seed=seed,
    )


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> tuple[Draft, Candidate]:
    """A draft with everything open, and what is simulated of it, as the pass hands them over."""
    found: list[tuple[Draft, Candidate]] = []

    class Kept(Search):
        def run(self) -> Rung:
            found.append((self.draft, self.base))
            return super().run()

    folder: Path = tmp_path_factory.mktemp("search")
    recipe = RECIPE.replace("batch_size = 2", "batch_size = 4\nmax_grad_norm = 0.0") + OPEN
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "Search", Kept)
        machine = evolve(GPU, device_name="NVIDIA GeForce RTX 4090", host_total_bytes=0)
        result = compiled(project(folder, recipe), machine=machine, memory_model=Formula())
    assert found, result.diagnostics
    return found[0]


def search(held: tuple[Draft, Candidate], model: Sizes, budget: float) -> Search:
    draft, base = held
    return Search(draft=draft, model=model, base=base, budget=round(budget * MIB))


def span(held: tuple[Draft, Candidate], model: Sizes, count: int) -> list[int]:
    """Budgets in MiB from what nothing fits to what all do, in equal ratios."""
    wide = search(held, model, 1)
    least = min(map(wide.peak, wide.choices.thriftiest())) / MIB * 0.9
    ratio = wide.peak(wide.first) / MIB * 1.1 / least
    return [round(least * ratio ** (n / (count - 1))) for n in range(count)]


def shown_time(found: Search, rung: Rung) -> int:
    """In the finest steps that are told apart."""
    if rung == found.first:
        return round(1 / FINEST)
    return round(max(found._seconds(rung) / found._seconds(found.first), 1.0) / FINEST)


@pytest.mark.parametrize("noise", [0.0, 0.05, 0.3])
@pytest.mark.parametrize("seed", range(6))
def test_a_larger_budget_never_gives_a_slower_plan(
    held: tuple[Draft, Candidate], seed: int, noise: float
) -> None:
    """However far off the estimates are."""
    model, before, fitted = sizes(seed, noise), None, False
    found = search(held, model, 1)
    for budget in span(held, model, 25):
        found.budget = budget * MIB
        chosen = found.run()
        fits = found.peak(chosen) <= budget * MIB
        assert fits or not fitted
        fitted = fits
        if fits:
            time = shown_time(found, chosen)
            assert before is None or time <= before
            before = time
    assert fitted and chosen == found.first


@pytest.mark.parametrize("seed", range(5))
def test_nothing_quicker_fits(held: tuple[Draft, Candidate], seed: int) -> None:
    """Every combination there is, simulated; by a model whose parts add up, as a phase's do."""
    model = sizes(seed)
    wide = search(held, model, 1)
    start = wide.look(wide.first)
    timer = clock(held[0], start.parameters)
    every = []
    for rung in wide.choices.every():
        one = wide.look(rung)
        waiting = one.blocks_waiting + one.activations_waiting
        time = timer.seconds(rung, one.flops, waiting) / timer.seconds(wide.first, start.flops, 0)
        every.append((wide.peak(rung) / MIB, time, altered(wide.choices, rung)))
    assert len(every) > 800
    for budget in span(held, model, 7)[1:]:
        found = search(held, model, budget)
        chosen = found.run()
        assert found.fits(chosen) and len(found.found) <= 12
        time = shown_time(found, chosen)
        room = budget * (1 - 2 * STEP)  # what saves little more is not looked at
        quickest = min(spent for needed, spent, _ in every if needed <= room)
        assert time * FINEST <= quickest + 1.5 * FINEST
        gentler = [
            more
            for needed, spent, more in every
            if needed <= room and round(spent / FINEST) < time and spent
        ]
        assert not gentler or min(gentler) >= altered(found.choices, chosen)


@pytest.mark.parametrize("noise", [0.0, 0.2])
@pytest.mark.parametrize("seed", range(4))
def test_rungs_above_need_more_and_those_below_less(
    held: tuple[Draft, Candidate], seed: int, noise: float
) -> None:
    model = sizes(seed, noise)
    for budget in span(held, model, 6)[1:]:
        found = search(held, model, budget)
        rungs = found.seen(found.run())
        place = next((n for n, rung in enumerate(rungs) if rung.chosen), 0)
        peaks = [rung.peak_bytes for rung in rungs]
        assert all(above > below for above, below in pairwise(peaks))
        times = [rung.relative_time for rung in rungs]
        assert all(time <= times[place] + FINEST for time in times[:place])
        assert all(time >= times[place] - FINEST for time in times[place:])


def test_parts_of_a_batch_go_with_fewer_recomputed_blocks(tmp_path: Path) -> None:
    """Where activations are most of it, and nothing may wait on the host: a small part with some
    blocks recomputed is quicker than whole batches with all of them, which fit as well."""
    model = Sizes(weights=4000, state=100, sample=7000, gradients=10, kept=0.1, aside=0.9)
    recipe = RECIPE.replace("batch_size = 2", "batch_size = 4") + OPEN
    fixed = ('memory.offload="none"', 'model.transformer.quantize="none"')
    budget = 'memory.budget="10 GiB"'
    found = compiled(project(tmp_path, recipe), budget, *fixed, machine=GPU, memory_model=model)
    assert found.plan is not None
    assert found.plan.steps.micro_batch == 1
    assert found.plan.memory.layout.activation_checkpointing == 4
    whole = compiled(
        tmp_path / "recipe.toml",
        budget,
        *fixed,
        "memory.micro_batch=4",
        machine=GPU,
        memory_model=model,
    )
    assert whole.plan is not None and whole.plan.memory.layout.activation_checkpointing == 1
    times = [next(r for r in f.memory.ladder if r.chosen) for f in (found.plan, whole.plan)]
    assert times[0].relative_time < 0.9 * times[1].relative_time


def test_what_the_result_depends_on_stays_where_it_may(held: tuple[Draft, Candidate]) -> None:
    """16 bits of the optimizer's state, where the plan is as quick with them."""
    model = Sizes(weights=20000, state=500, sample=3000, gradients=10, kept=0.1, aside=0.1)
    tight = search(held, model, 4400)
    chosen = tight.run()
    assert tight.fits(chosen)
    other = evolve(chosen, optimizer="adamw")
    if chosen.optimizer != "adamw":
        assert not tight.fits(other)
    roomy = search(held, model, 12000)
    assert roomy.run().optimizer == "adamw"


def test_gradients_that_are_not_kept_where_parts_of_a_batch_would_keep_them(tmp_path: Path) -> None:
    """Everything saved at once is two things: an update in the backward pass, or smaller parts."""
    model = Sizes(weights=1000, state=100, sample=50, gradients=3000, kept=0.1, aside=0.1)
    recipe = RECIPE.replace("batch_size = 2", "batch_size = 4\nmax_grad_norm = 0.0")
    budget = 'memory.budget="1300 MiB"'
    found = compiled(project(tmp_path, recipe), budget, machine=GPU, memory_model=model)
    assert found.plan is not None, found.diagnostics
    assert found.plan.memory.layout.fused_backward and found.plan.steps.micro_batch == 0


@pytest.mark.parametrize("seed", range(6))
def test_no_rung_is_shown_that_another_is_known_to_beat(
    held: tuple[Draft, Candidate], seed: int
) -> None:
    """What is chosen for a rung's own peak is no quicker than the rung: nobody pays less for that
    than was shown."""
    model = sizes(seed)
    for budget in span(held, model, 5)[1:]:
        found = search(held, model, budget)
        chosen = found.run()
        if chosen == found.first:  # beside it stands one saving alone
            continue
        rungs = found.seen(chosen)
        place = next(n for n, rung in enumerate(rungs) if rung.chosen)
        for rung in rungs[place + 1 :]:
            again = search(held, model, rung.peak_bytes / MIB + 1)
            time = again._seconds(again.run()) / again._seconds(again.first)
            assert rung.relative_time <= time + 2 * FINEST


def test_what_the_host_has_no_room_for_is_told(held: tuple[Draft, Candidate]) -> None:
    """Where a larger host would have made it quicker, the reason says so; else it does not."""
    draft, base = held
    small = evolve(draft, machine=evolve(draft.machine, host_total_bytes=64 * MIB))
    model, told = sizes(1), []
    for budget in span(held, model, 15)[3:-1]:
        poor, rich = search((small, base), model, budget), search(held, model, budget)
        chosen, better = poor.run(), rich.run()
        if chosen == poor.first or not poor.fits(chosen):
            continue
        slower = poor._seconds(chosen) > 1.05 * poor._seconds(better)
        told.append("of host memory" in poor.why(chosen))
        assert told[-1] or not slower
        assert "of host memory" not in rich.why(better)
        shown = poor._around(chosen)
        assert all(poor._goes(r) or not poor.fits(r) for r in shown[: shown.index(chosen)])
    assert True in told
