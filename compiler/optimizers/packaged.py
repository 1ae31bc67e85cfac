"""Optimizers of other packages: `pip install tuner[optimizers]`, or the package alone.

State bytes were measured on the processor (float32 and bfloat16 weights of 1,024 x 1,024), except
for bitsandbytes, where they follow from its layout.
"""

from __future__ import annotations

from compiler.optimizers.facts import (
    FACTORS,
    GLOBAL_ESTIMATE,
    OptimizerFacts,
    always,
    kahan,
    weights_like,
)

ADAM = {"betas": (0.9, 0.999), "eps": 1e-8}
OPTIMI = {"betas": (0.9, 0.99), "eps": 1e-6}  # torch-optimi's own defaults
THREE = {"betas": (0.9, 0.999, 0.9999)}

# torch-optimi keeps a compensation term where weights are bfloat16 (Kahan summation), so that
# small updates are not lost: Zamirai et al., "Revisiting BFloat16 training", arXiv 2010.06192.
_KAHAN = tuple(
    OptimizerFacts(
        name=name,
        title=title,
        path=f"optimi.{cls}",
        package="torch-optimi",
        state_bytes=kahan(states),
        defaults=defaults,
        constants={"kahan_sum": None},  # where weights have 16 bits
        ours=ours,
        most=most,
        usual_lr=lr,
        devices=("cpu", "cuda", "mps"),
        reads_values=name == "stableadamw",
        copies=2 if name == "stableadamw" else 0,
        whole="it scales its step by a mean over the whole weight" if name == "stableadamw" else "",
        bf16="kahan",
        shaping=("momentum",) if name == "optimi-sgd" else (),
        late=5 if cls in ("RAdam", "Ranger") else 1,  # as `radam`
    )
    for name, title, cls, states, defaults, ours, most, lr in (
        # Wortsman et al., "Stable and low-precision training", arXiv 2304.13013.
        (
            "stableadamw",
            "StableAdamW",
            "StableAdamW",
            2,
            {**OPTIMI, "weight_decay": 1e-2},
            {},
            {},
            (0.0, 0.1),
        ),
        # Chen et al., "Symbolic discovery of optimization algorithms", arXiv 2302.06675.
        (
            "lion",
            "Lion",
            "Lion",
            1,
            {"betas": (0.9, 0.99), "weight_decay": 0.0},
            {},
            {},
            (0.0, 0.01),
        ),
        # Wright, "Ranger": RAdam with Zhang et al., "Lookahead optimizer", arXiv 1907.08610.
        (
            "ranger",
            "Ranger (RAdam with Lookahead)",
            "Ranger",
            3,
            {**OPTIMI, "weight_decay": 0.0, "k": 6, "alpha": 0.5},
            {},
            {"alpha": 1.0},
            (0.0, 0.1),
        ),
        # Xie et al., "Adan", arXiv 2208.06677.
        (
            "adan",
            "Adan",
            "Adan",
            4,
            {"betas": (0.98, 0.92, 0.99), "eps": 1e-6, "weight_decay": 2e-2},
            {},
            {},
            (0.0, 0.1),
        ),
        (
            "optimi-adamw",
            "AdamW with Kahan summation",
            "AdamW",
            2,
            {**OPTIMI, "weight_decay": 1e-2},
            {},
            {},
            (0.0, 0.1),
        ),
        (
            "optimi-adam",
            "Adam with Kahan summation",
            "Adam",
            2,
            {**OPTIMI, "weight_decay": 0.0},
            {},
            {},
            (0.0, 0.1),
        ),
        (
            "optimi-radam",
            "RAdam with Kahan summation",
            "RAdam",
            2,
            {**OPTIMI, "weight_decay": 0.0},
            {},
            {},
            (0.0, 0.1),
        ),
        (
            "optimi-sgd",
            "SGD with Kahan summation",
            "SGD",
            1,
            {"momentum": 0.9, "weight_decay": 0.0},
            {"momentum": "as in `sgd`"},
            {},
            (0.0, 1000.0),
        ),
    )
)

PACKAGED = (
    *_KAHAN,
    # Defazio et al., "The road less scheduled", arXiv 2405.15682.
    OptimizerFacts(
        name="adamw-schedulefree",
        title="schedule-free AdamW",
        path="schedulefree.AdamWScheduleFree",
        package="schedulefree",
        state_bytes=weights_like(2),
        defaults={**ADAM, "weight_decay": 0.0, "r": 0.0, "weight_lr_power": 2.0},
        least={"betas": 1e-6},  # it divides by the first one
        foreach=True,
        averages=True,
    ),
    OptimizerFacts(
        name="radam-schedulefree",
        title="schedule-free RAdam",
        path="schedulefree.RAdamScheduleFree",
        package="schedulefree",
        state_bytes=weights_like(2),
        late=5,  # until its variance is known well enough, its step is another one
        defaults={**ADAM, "weight_decay": 0.0, "r": 0.0, "weight_lr_power": 2.0},
        least={"betas": 1e-6},
        foreach=True,
        averages=True,
    ),
    # Mishchenko and Defazio, "Prodigy", arXiv 2306.06101.
    OptimizerFacts(
        name="prodigy",
        title="Prodigy (finds its own step size)",
        path="prodigyopt.Prodigy",
        package="prodigyopt",
        state_bytes=weights_like(4),
        defaults={
            **ADAM,
            "weight_decay": 0.0,
            "d0": 1e-6,
            "d_coef": 1.0,
            "use_bias_correction": False,
            "safeguard_warmup": False,
            "slice_p": 1,
        },
        optional=("growth_rate",),
        shaping=("slice_p", "betas"),
        usual_lr=(0.1, 10.0),
        reads_values=True,
        copies=2,
        whole=GLOBAL_ESTIMATE,
        not_in_backward=GLOBAL_ESTIMATE,
        one_lr=GLOBAL_ESTIMATE,
    ),
    # Luo et al., "CAME", arXiv 2307.02047.
    OptimizerFacts(
        name="came",
        title="CAME",
        path="came_pytorch.CAME",
        package="came-pytorch",
        state_bytes=always(4 + 2 * 8 / 1024),
        defaults={**THREE, "clip_threshold": 1.0, "weight_decay": 0.0},
        whole=FACTORS,
    ),
    # Vyas et al., "SOAP", arXiv 2409.11321.
    OptimizerFacts(
        name="soap",
        title="SOAP",
        path="pytorch_optimizer.SOAP",
        package="pytorch-optimizer",
        state_bytes=weights_like(6),
        late=10,  # by default it turns its axes at each tenth update from the first one on
        defaults={
            "betas": (0.95, 0.95),
            "eps": 1e-8,
            "weight_decay": 1e-2,
            "precondition_frequency": 10,
            "max_precondition_dim": 10000,
        },
        shaping=("max_precondition_dim",),
        whole="it turns each whole matrix into its own axes",
    ),
    # Pagliardini et al., "The AdEMAMix optimizer", arXiv 2409.03137.
    OptimizerFacts(
        name="ademamix",
        title="AdEMAMix",
        path="pytorch_optimizer.AdEMAMix",
        package="pytorch-optimizer",
        state_bytes=weights_like(3),
        defaults={**THREE, "eps": 1e-8, "weight_decay": 0.0, "alpha": 5.0},
        optional=("t_alpha_beta3",),
        constants={"weight_decouple": True},
    ),
)

_BLOCK = 4 / 256  # a float32 scale for each block of 256
_ADEMAMIX = {**THREE, "eps": 1e-8, "weight_decay": 1e-2, "alpha": 5.0}
_KINDS = (  # name, class, moments, arguments, whether it is there without blocks and paged
    ("adagrad", "Adagrad", 1, {"lr_decay": 0.0, "weight_decay": 0.0, "eps": 1e-10}, False),
    ("adam", "Adam", 2, {**ADAM, "weight_decay": 0.0}, True),
    ("adamw", "AdamW", 2, {**ADAM, "weight_decay": 1e-2}, True),
    ("lion", "Lion", 1, {"betas": (0.9, 0.99), "weight_decay": 0.0}, True),
    ("ademamix", "AdEMAMix", 3, _ADEMAMIX, True),
)

# Dettmers et al., arXiv 2110.02861. "paged" states may be moved to host memory by the driver; here
# they are counted as if they stayed.
BITSANDBYTES = tuple(
    OptimizerFacts(
        name=f"bnb-{name}{'-8bit' if eight else ''}{'-paged' if paged else ''}",
        title=f"{cls} of bitsandbytes{', states in 8 bits' if eight else ''}"
        f"{', paged' if paged else ''}",
        path=f"bitsandbytes.optim.{'Paged' if paged else ''}{cls}{'8bit' if eight else ''}",
        package="bitsandbytes",
        state_bytes=always(moments * (1 + _BLOCK) if eight else 4.0 * moments),
        defaults=defaults,
        optional=("t_alpha", "t_beta3") if name == "ademamix" else (),
        usual_lr={"adagrad": (0.0, 1.0), "lion": (0.0, 0.01)}.get(name, (0.0, 0.1)),
        devices=("cuda",),
        block=1 if eight else 0,
        full_bytes=4.0 * moments,
        eight_bit="" if eight else f"bnb-{name}-8bit{'-paged' if paged else ''}",
    )
    for name, cls, moments, defaults, pages in _KINDS
    for eight in (False, True)
    for paged in ((False, True) if pages else (False,))
)
