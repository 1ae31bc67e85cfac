"""The average against its formula in float64."""

from __future__ import annotations

import pytest
import torch
from attrs import evolve
from safetensors.torch import load_file
from torch import nn

from compiler import plan
from runtime import checkpoints
from runtime import ema as averaging
from runtime.ema import Ema
from runtime.execute import execute
from runtime.export.request import chosen
from runtime.export.weights import trained_weights
from runtime.memory.tracker import Tracker
from runtime.out_of_memory import is_torn
from tests.runtime.plans import LORA, PICTURES, draw_data, tiny_plan
from tests.runtime.run_plan import Interrupting


def facts(decay=0.9, every=1, device="cpu") -> plan.Ema:
    return plan.Ema(decay=decay, device=device, every=every)


def walk(p: nn.Parameter, step: int) -> None:
    with torch.no_grad():
        generator = torch.Generator().manual_seed(step)
        p.add_(torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype))


@pytest.mark.parametrize("device", ["cpu", "same"])
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize(
    ("dtype", "rtol"), [(torch.float64, 1e-14), (torch.float32, 1e-5), (torch.bfloat16, 1e-5)]
)
def test_formula(dtype, rtol, every, device):
    p = nn.Parameter(torch.ones(40, dtype=dtype))
    ema = Ema(facts(0.9, every, device), [("p", p)])
    expected = p.detach().double().clone()
    for done in range(1, 21):
        walk(p, done)
        ema.update(done)
        if done % every == 0:
            expected = 0.9 * expected + 0.1 * p.detach().double()
    assert ema.average["p"].dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(ema.average["p"].double(), expected, rtol=rtol, atol=rtol)


def test_bfloat16_weights_do_not_stall_the_average():
    p = nn.Parameter(torch.full((4,), 1.0, dtype=torch.bfloat16))
    ema = Ema(facts(0.999), [("p", p)])
    with torch.no_grad():
        p.fill_(2.0)
    for done in range(1, 101):
        ema.update(done)
    assert ema.average["p"][0].item() == pytest.approx(2 - 0.999**100, rel=1e-5)


def test_swapped_shows_the_average_and_gives_every_bit_back():
    p = nn.Parameter(torch.randn(16).bfloat16())
    ema = Ema(facts(), [("p", p)])
    walk(p, 1)
    ema.update(1)
    weights, pointer = p.detach().clone(), p.data_ptr()
    with ema.swapped():
        assert torch.equal(p, ema.average["p"].bfloat16())
        assert not torch.equal(p, weights)
    assert torch.equal(p, weights)
    with pytest.raises(ValueError, match="drawing failed"), ema.swapped():
        raise ValueError("drawing failed")
    assert torch.equal(p, weights)
    assert p.data_ptr() == pointer


def test_state_goes_on_exactly():
    def trained(stop: int | None) -> torch.Tensor:
        p = nn.Parameter(torch.zeros(8))
        ema = Ema(facts(every=2), [("p", p)])
        for done in range(1, 9):
            walk(p, done)
            ema.update(done)
            if done == stop:
                state = ema.state()
                ema = Ema(facts(every=2), [("p", p)])
                ema.load_state(state)
        return ema.average["p"]

    assert torch.equal(trained(None), trained(5))
    with pytest.raises(KeyError):
        Ema(facts(), [("p", nn.Parameter(torch.zeros(1)))]).load_state({})


@pytest.mark.parametrize("every", [1, 4])
def test_warm_up_formula(every):
    p = nn.Parameter(torch.ones(8, dtype=torch.float64))
    ema = Ema(plan.Ema(decay=0.7, device="cpu", every=every, warmup=True), [("p", p)])
    expected, kept = p.detach().clone(), []
    for done in range(1, 30 * every + 1):
        walk(p, done)
        ema.update(done)
        if done % every == 0:
            k = done // every
            kept.append(min((1 + k) / (10 + k), 0.7))
            expected = kept[-1] * expected + (1 - kept[-1]) * p.detach()
    assert kept[0] == 2 / 11 and kept[-1] == 0.7
    torch.testing.assert_close(ema.average["p"], expected, rtol=1e-13, atol=1e-13)


def test_a_warm_up_goes_on_where_it_was():
    """Nothing but the average itself is carried over."""
    facts_ = plan.Ema(decay=0.99, device="cpu", every=2, warmup=True)
    p = nn.Parameter(torch.zeros(8))
    whole = Ema(facts_, [("p", p)])
    for done in range(1, 11):
        if done == 6:
            other = Ema(facts_, [("p", p)])
            other.load_state(whole.state())
        walk(p, done)
        whole.update(done)
        if done >= 6:
            other.update(done)
    assert torch.equal(whole.average["p"], other.average["p"])


def walked(count: int = 20, numbers: int = 1000) -> Ema:
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(numbers, generator=generator).bfloat16() for _ in range(count)]
    found = Ema(facts(), [(f"p{n}", nn.Parameter(each)) for n, each in enumerate(made)])
    for p in found.parameters.values():
        walk(p, 1)
    return found


def test_on_another_device_copies_are_made_in_pieces(monkeypatch):
    """Weights count as another device's: no more copies are there together, and to the same bits as
    all at once. A weight that is larger than a piece is copied alone."""
    whole, pieces, lerp, cuts = walked(), walked(), torch._foreach_lerp_, []
    whole.update(1)

    def counted(averages, *rest):
        cuts.append(len(averages))
        lerp(averages, *rest)

    monkeypatch.setattr(averaging, "_is_elsewhere", lambda average, parameter: True)
    monkeypatch.setattr(torch, "_foreach_lerp_", counted)
    for size, expected in ((3 * 4000, [3] * 6 + [2]), (100, [1] * 20), (10**9, [20])):
        cuts.clear()
        pieces = walked()
        monkeypatch.setattr(averaging, "PIECE", size)
        tracker = Tracker({"cpu"})
        tracker.exclude([*pieces.average.values(), *pieces.parameters.values()])
        with tracker:
            pieces.update(1)
        assert cuts == expected
        assert tracker.peak == max(expected) * 4096  # of 4000 bytes each, rounded
        assert all(torch.equal(pieces.average[n], a) for n, a in whole.average.items())


@pytest.mark.parametrize("failing", [1, 2])
def test_pieces_are_torn_only_once_one_was_changed(failing, monkeypatch):
    """Where the host has no room for the copies of the first or the second one."""
    found, real, calls = walked(), averaging._copied, []
    before = {name: a.clone() for name, a in found.average.items()}

    def copied(average, parameter):
        calls.append(1)
        if len(calls) == failing:
            raise MemoryError
        return real(average, parameter)

    monkeypatch.setattr(averaging, "_is_elsewhere", lambda average, parameter: True)
    monkeypatch.setattr(averaging, "_copied", copied)
    monkeypatch.setattr(averaging, "PIECE", 100)
    with pytest.raises(MemoryError) as caught:
        found.update(1)
    assert is_torn(caught.value) is (failing == 2)
    same = all(torch.equal(found.average[name], a) for name, a in before.items())
    assert same is (failing == 1)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_both_are_saved_beside_each_other(method, tiny_sana, tmp_path):
    """The files hold the last checkpoint's weights and its average."""
    facts_ = plan.Ema(decay=0.9, device="cpu", every=1, save="both")
    settings = {"steps": 2, "ema": facts_, "adapter": LORA if method == "lora" else None}
    data = draw_data(tmp_path / "dog")
    made, manifest = tiny_plan("sana", tiny_sana, data, tmp_path / "run", **settings)
    result = execute(made, manifest, Interrupting("", 0, 0)).result
    saved = checkpoints.latest(tmp_path / "run" / "checkpoints")
    snapshot = checkpoints.load(saved)
    if method == "lora":
        places = (result, result.with_name("lora_ema"))
    else:
        places = (result / "transformer", result / "transformer_ema")
    for place, values in zip(places, (snapshot.weights, snapshot.ema), strict=True):
        (file,) = place.glob("*.safetensors")
        found = list(load_file(file).values())
        assert len(found) >= len(values)
        for value in values.values():
            assert any(each.shape == value.shape and torch.equal(each, value) for each in found)
    for ema, values in (
        (None, snapshot.weights), (False, snapshot.weights), (True, snapshot.ema)
    ):  # fmt: skip
        chosen_ = trained_weights(chosen(tmp_path / "run", ema=ema))
        for name, value in values.items():
            assert torch.equal(chosen_[name].read(), value), ema


def test_pictures_are_drawn_with_the_weights_that_the_plan_names(tiny_sana, tmp_path):
    """With the trained ones they are those of a run without average; that changes no weight."""
    facts_ = plan.Ema(decay=0.9, device="cpu", every=1)
    data, bytes_, trained = draw_data(tmp_path / "dog"), {}, {}
    for name, ema, weights in (
        ("none", None, None),
        ("trained", facts_, "trained"),
        ("average", facts_, "average"),
    ):
        made, manifest = tiny_plan(
            "sana",
            tiny_sana,
            data,
            tmp_path / name,
            steps=3,
            lr=0.1,
            ema=ema,
            validation=evolve(PICTURES, weights=weights),
        )
        execute(made, manifest, Interrupting("", 0, 0))
        bytes_[name] = {p.parent.name: p.read_bytes() for p in (tmp_path / name).rglob("*.png")}
        saved = checkpoints.latest(tmp_path / name / "checkpoints")
        trained[name] = checkpoints.load(saved).weights
    assert bytes_["trained"] == bytes_["none"] and len(bytes_["none"]) == 2
    assert bytes_["average"]["step-000000"] == bytes_["none"]["step-000000"]
    assert bytes_["average"]["step-000003"] != bytes_["none"]["step-000003"]
    for weights in trained.values():
        assert all(torch.equal(value, trained["none"][key]) for key, value in weights.items())
