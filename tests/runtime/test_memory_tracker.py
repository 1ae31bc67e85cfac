"""The tracker by hand-counted examples, and the parts that the simulation stands on."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from runtime.memory.attention import COUNTERS, choose, workspace
from runtime.memory.measure import measure
from runtime.memory.meta import MetaKernels
from runtime.memory.pretend import as_on
from runtime.memory.rounding import rounded
from runtime.memory.tracker import Tracker

CPU = torch.device("cpu")


@pytest.mark.parametrize(("asked", "given"), [(0, 0), (1, 512), (512, 512), (513, 1024)])
def test_rounding(asked: int, given: int) -> None:
    assert rounded(asked) == given


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_births_and_deaths(device: str) -> None:
    tracker = Tracker({device})
    weights = torch.empty(1000, device=device)  # 4000 -> 4096 bytes
    tracker.register([weights], "weights")
    with tracker:
        a = torch.empty(128, device=device)  # 512
        view = a.view(2, 64)[1]  # the same storage
        del a
        assert tracker.current == 4096 + 512
        b = view + 1  # 256 -> 512
        del view
        c = b.mul_(2)  # in place
        assert tracker.current == 4096 + 512
        tracker.workspace(700)
        del b, c
    assert tracker.current == 4096
    assert tracker.peak == 4096 + 512 + 1024
    assert tracker.breakdown() == {"weights": 4096, "activations": 512, "workspace": 1024}


def test_other_devices_are_not_counted() -> None:
    with Tracker({"meta"}) as tracker:
        kept = torch.empty(10)
    assert (tracker.current, kept.numel()) == (0, 10)


def test_names_given_later_and_after_a_reset() -> None:
    model = nn.Linear(256, 256, bias=False)  # 256 KiB
    tracker = Tracker({"cpu"})
    tracker.register(model.parameters(), "weights")
    with tracker:
        model(torch.ones(1, 256)).sum().backward()
        assert model.weight.grad is not None
        tracker.register([model.weight.grad], "gradients")
        tracker.reset_peak()
        torch.empty(0)
    assert tracker.breakdown() == {"weights": 2**18, "gradients": 2**18}


def test_resized_storage_counts_anew() -> None:
    with Tracker({"cpu"}) as tracker:
        a = torch.empty(128)
        a.resize_(1024)
        assert tracker.current == 4096
    assert tracker.peak == 4096


def test_flops_agree_with_pytorch_on_cached_operations() -> None:
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(3))).to("meta")
    kernels = MetaKernels(COUNTERS, "cpu")
    with Tracker({"meta"}, kernels):
        model(torch.empty(8, 16, device="meta")).sum().backward()
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(8, 16, device="meta")).sum().backward()
    assert kernels.flops == counter.get_total_flops() > 0


def test_cached_results_are_new_memory_of_the_same_form() -> None:
    kernels = MetaKernels(COUNTERS, "cpu")
    x = torch.empty(4, 6, device="meta").t()
    with Tracker({"meta"}, kernels) as tracker:
        first, second = x + 1, x + 1
        flat = torch.empty(4, 6, device="meta")
        whole = torch.ops.aten._unsafe_view(flat, (24,))  # an alias that no schema admits
        again = torch.ops.aten._unsafe_view(flat, (24,))
        means = [torch.var_mean(x) for _ in range(2)]
    assert first.stride() == second.stride() == x.stride()
    assert first.untyped_storage()._cdata != second.untyped_storage()._cdata
    assert whole.untyped_storage()._cdata == again.untyped_storage()._cdata
    assert [len(m) for m in means] == [2, 2]
    assert tracker.current == 512 * (3 + 4)


@pytest.mark.parametrize(
    ("dtype", "head", "masked", "kernel"),
    [
        (torch.bfloat16, 64, False, "flash"),
        (torch.bfloat16, 60, False, "flash"),
        (torch.bfloat16, 264, False, "efficient"),
        (torch.bfloat16, 112, True, "efficient"),
        (torch.bfloat16, 60, True, "math"),
        (torch.float32, 60, False, "efficient"),
        (torch.float32, 62, False, "math"),
        (torch.float64, 64, False, "math"),
    ],
)
def test_choice_of_kernel(dtype: torch.dtype, head: int, masked: bool, kernel: str) -> None:
    query = torch.empty(1, 2, 5, head, dtype=dtype, device="meta")
    assert choose(query, query, masked) == kernel


@pytest.mark.parametrize("masked", [False, True])
def test_attention_saves_no_scores(masked: bool) -> None:
    """What is kept grows with the tokens, not with their square."""
    tokens = 1024

    def run(device: str) -> int:
        q, k, v = (
            torch.empty(1, 2, tokens, 64, dtype=torch.bfloat16, device="meta", requires_grad=True)
            for _ in range(3)
        )
        mask = torch.zeros(1, 2, 1, tokens, dtype=torch.bfloat16, device="meta")
        with as_on(device), Tracker({"meta"}, workspaces=workspace(device)) as tracker:
            out = functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask if masked else None
            )
            assert out.shape == q.shape
            out.sum().backward()
        return tracker.peak

    row = 2 * tokens * 64 * 2
    assert run("cpu") < 8 * row
    assert run("cuda") < 10 * row
    assert functional.scaled_dot_product_attention.__module__ != "runtime.memory.attention"


def test_dropout_keeps_a_byte_per_element_on_accelerators() -> None:
    x = torch.empty(1024, 1024, device="meta", requires_grad=True)
    kept = {}
    for device in ("cpu", "cuda"):
        with as_on(device), Tracker({"meta"}) as tracker:
            out = functional.dropout(x, 0.1)
            kept[device] = tracker.current
            assert out.shape == x.shape
            del out
    assert kept == {"cpu": 2 * 2**22, "cuda": 2**22 + 2**20}


def test_measure_on_the_cpu() -> None:
    weight = torch.ones(256, 256, requires_grad=True)
    given = torch.ones(1, 256)

    def run(mark: object) -> float:
        assert callable(mark)
        (given @ weight).sum().backward()
        assert weight.grad is not None
        mark([weight.grad], "gradients")
        return 3.0

    measured = measure(run, CPU, {"weights": [weight], "batch": [given]})
    assert measured.result == 3.0
    assert measured.parts["weights"] == measured.parts["gradients"] == 2**18
    assert measured.parts["batch"] == 1024
    assert measured.peak == sum(measured.parts.values())


def test_measure_refuses_what_it_cannot_measure() -> None:
    with pytest.raises(ValueError, match="mps"):
        measure(lambda mark: 1, torch.device("mps"), {})
