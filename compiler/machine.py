"""What the compiler must know of a machine; `runtime.machine` looks, the compiler only reads."""

from __future__ import annotations

from attrs import frozen

from compiler.plan import Device

DEEPSPEED = "deepspeed"
OPENCV = "opencv-contrib-python-headless"  # finds faces and what is salient
TRITON = "triton"  # package that writes compiled kernels for CUDA
COMPILER = "c++"  # how a C++ compiler is called in `Machine.missing`
HUB_TOKEN = "a token of the hub"  # in `Machine.missing`


@frozen(kw_only=True)
class Machine:
    """One machine. Bytes are bytes."""

    device: Device  # the first accelerator, else "cpu"
    device_name: str
    device_total_bytes: int  # of "cpu": the host's memory
    device_free_bytes: int
    free_is: str = "free on the device now"  # what `device_free_bytes` are, for a person
    host_total_bytes: int  # 0: not known
    host_free_bytes: int
    cores: int
    bf16: bool  # the device multiplies bfloat16 natively
    capability: str = ""  # CUDA compute capability, "9.0"
    processor_flops: float = 0.0  # a second and core in float32, nominal; 0: not known
    here: bool = True  # else one that was named: of it little more is known than its device
    missing: tuple[str, ...] = ()  # optional packages, `COMPILER` or `HUB_TOKEN`: what is not there
