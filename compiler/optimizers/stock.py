"""Optimizers that need no further package: PyTorch's, torchao's and our own.

State bytes were measured on the processor (float32 and bfloat16 weights of 1,024 x 1,024).
"""

from __future__ import annotations

from compiler.optimizers.facts import FACTORS, ON_HOST, OptimizerFacts, always, weights_like
from compiler.plan import Device

FUSED: tuple[Device, ...] = ("cpu", "cuda", "mps", "xpu")
COMPILED: tuple[Device, ...] = ("cpu", "cuda", "xpu")  # where torch.compile has a back end
ADAM = {"betas": (0.9, 0.999), "eps": 1e-8}
FACTORED = 8 / 1024  # a row and a column in float32, per weight of a 1,024 x 1,024 matrix

STOCK = (
    # Loshchilov and Hutter, "Decoupled weight decay regularization", arXiv 1711.05101.
    OptimizerFacts(
        name="adamw",
        title="AdamW",
        path="torch.optim.AdamW",
        state_bytes=weights_like(2),
        defaults={**ADAM, "weight_decay": 1e-2},
        fused=FUSED,
        foreach=True,
        eight_bit="adamw-8bit",
    ),
    # Kingma and Ba, "Adam", arXiv 1412.6980; weight decay is added to the gradient here.
    OptimizerFacts(
        name="adam",
        title="Adam",
        path="torch.optim.Adam",
        state_bytes=weights_like(2),
        defaults={**ADAM, "weight_decay": 0.0},
        fused=FUSED,
        foreach=True,
        eight_bit="adam-8bit",
    ),
    # Liu et al., "On the variance of the adaptive learning rate and beyond", arXiv 1908.03265.
    OptimizerFacts(
        name="radam",
        title="RAdam",
        path="torch.optim.RAdam",
        state_bytes=weights_like(2),
        late=5,
        defaults={**ADAM, "weight_decay": 0.0},
        constants={"decoupled_weight_decay": True},
        foreach=True,
    ),
    # Duchi, Hazan and Singer, "Adaptive subgradient methods", JMLR 12, 2011.
    OptimizerFacts(
        name="adagrad",
        title="Adagrad",
        path="torch.optim.Adagrad",
        state_bytes=weights_like(1),
        defaults={"lr_decay": 0.0, "weight_decay": 0.0, "eps": 1e-10},
        usual_lr=(0.0, 1.0),
        foreach=True,
        eight_bit="bnb-adagrad-8bit",
    ),
    OptimizerFacts(
        name="sgd",
        title="SGD with momentum",
        path="torch.optim.SGD",
        state_bytes=weights_like(1),
        defaults={"momentum": 0.9, "weight_decay": 0.0, "nesterov": False},
        ours={"momentum": "without it, few diffusion models train at all"},
        usual_lr=(0.0, 1000.0),
        fused=FUSED,
        foreach=True,
    ),
    # Shazeer and Stern, "Adafactor", arXiv 1804.04235. Its learning rate is relative to each
    # weight's own size; it keeps no first moment.
    OptimizerFacts(
        name="adafactor",
        title="Adafactor",
        path="torch.optim.Adafactor",
        state_bytes=weights_like(FACTORED / 4),
        defaults={"beta2_decay": -0.8, "clip_threshold": 1.0, "weight_decay": 0.0},
        renamed={"clip_threshold": "d"},
        whole=FACTORS,
        reads_values=True,
        factored=True,
        copies=2,
        usual_lr=(0.0, 1.0),
    ),
    # Jordan et al., "Muon", 2024; the step is scaled to the size of AdamW's (Liu et al., "Muon is
    # scalable for LLM training", arXiv 2502.16982), so that one learning rate serves both.
    OptimizerFacts(
        name="muon",
        title="Muon for matrices, AdamW for the rest",
        path="runtime.muon.MuonAdamW",
        state_bytes=weights_like(1),
        defaults={
            "momentum": 0.95,
            "nesterov": True,
            "ns_steps": 5,
            "betas": (0.9, 0.999),
            "eps": 1e-8,
            "weight_decay": 0.1,
        },
        whole="it makes each whole matrix orthogonal",
        one_lr="it deals the weights out by their shapes alone",
    ),
    # torchao keeps the moments in blocks of 256 (128 at 4 bits), as Dettmers et al., "8-bit
    # optimizers via block-wise quantization", arXiv 2110.02861. Weights that are no whole number of
    # blocks, or have less than 4,096 elements, keep them in full.
    *(
        OptimizerFacts(
            name=name,
            title=title,
            path=f"torchao.optim.{cls}",
            state_bytes=always(number),
            defaults={**ADAM, "weight_decay": decay},
            constants={"bf16_stochastic_round": True},
            devices=COMPILED,
            compiled=True,
            block=128 if "4" in cls else 256,
            bf16="stochastic",
        )
        for name, title, cls, number, decay in (
            ("adamw-8bit", "AdamW, states in 8 bits", "AdamW8bit", 2.03, 1e-2),
            ("adamw-4bit", "AdamW, states in 4 bits", "AdamW4bit", 1.06, 1e-2),
            ("adamw-fp8", "AdamW, states in float8", "AdamWFp8", 2.03, 1e-2),
            ("adam-8bit", "Adam, states in 8 bits", "Adam8bit", 2.03, 0.0),
            ("adam-4bit", "Adam, states in 4 bits", "Adam4bit", 1.06, 0.0),
            ("adam-fp8", "Adam, states in float8", "AdamFp8", 2.03, 0.0),
        )
    ),
    OptimizerFacts(
        name="adamw-bf16",
        title="AdamW on pure bfloat16 weights, rounded stochastically",
        path="torchao.optim._AdamW",
        state_bytes=weights_like(2),
        defaults={**ADAM, "weight_decay": 1e-2},
        constants={"bf16_stochastic_round": True},
        devices=COMPILED,
        compiled=True,
        weights=("bfloat16",),
        bf16="stochastic",
        eight_bit="adamw-8bit",
    ),
    OptimizerFacts(
        name="adamw-offload",
        title="AdamW, states and update in host memory",
        path="runtime.offloaded.HostAdamW",
        state_bytes=always(0.0),
        host_bytes=8.0,
        defaults={**ADAM, "weight_decay": 1e-2},
        not_in_backward=ON_HOST,
        one_lr=ON_HOST,
    ),
)
