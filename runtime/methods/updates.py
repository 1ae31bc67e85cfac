"""The weight that an adapted layer multiplies by, computed from the adapter's weights alone.

The formulas stand in the papers that `compiler.adapters` names. All is float32.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from compiler.adapters import scale_of
from compiler.plan import Adapter
from runtime.methods.boft import butterfly, rotations

NEUMANN = 4  # the last power of Q in the series for OFT's rotation; peft counts five terms


def adapted_weight(
    weight: Tensor, parts: Mapping[str, Tensor], adapter: Adapter, module: str
) -> Tensor:
    """What takes the place of `weight`, (outputs, inputs) or (outputs, inputs, height, width).

    `parts` are the adapter's tensors of this module: "lora_A" and so on.
    """
    held = {part: tensor.float() for part, tensor in parts.items()}
    if "norm_w" in held:
        return weight.float() + held["norm_w"]
    matrix = weight.float().flatten(1)
    if adapter.kind == "oft":
        found = _rotated(matrix, cayley_neumann(held["oft_R"], adapter.block_size))
    elif adapter.kind == "ia3":
        found = held["ia3_l"].view(-1, 1) * matrix
    elif adapter.kind == "full":
        found = matrix + held["full_diff"].flatten(1)
    elif adapter.kind == "glora":
        found = matrix + scale_of(adapter, module) * _generalised(matrix, held)
    elif adapter.kind == "boft":
        turned = butterfly(matrix, rotations(held["boft_R"]), transposed=True)
        found = turned * held["boft_s"].view(-1, 1)
    else:
        found = matrix + scale_of(adapter, module) * product(held)
        lengths = held.get("lora_magnitude_vector", held.get("dora_scale"))
        if lengths is not None:
            lengths = lengths.view(-1, 1)
            found = lengths * found / found.norm(dim=1, keepdim=True)
    return found.view(weight.shape)


def _generalised(matrix: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
    """GLoRA's W A1 A2 + B1 B2."""
    flat = {name: parts[f"glora_{name}"].flatten(1) for name in ("a1", "a2", "b1", "b2")}
    return matrix @ flat["a1"] @ flat["a2"] + flat["b1"] @ flat["b2"]


def adapted_bias(bias: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
    """What takes the place of an adapted layer's bias."""
    if "norm_b" in parts:
        return bias.float() + parts["norm_b"].float()
    if "ia3_l" not in parts:
        return bias
    return parts["ia3_l"].float().flatten() * bias.float()


def product(parts: Mapping[str, Tensor]) -> Tensor:
    """What is scaled and added to the weight, (outputs, inputs): B A; of LoHa (B1 A1) (B2 A2),
    number by number; of LoKr the Kronecker product of two matrices, each of which may be two."""
    if "lora_A" in parts:
        return parts["lora_B"].flatten(1) @ parts["lora_A"].flatten(1)
    if "hada_t1" in parts:
        one, other = (_tucker(parts, f"hada_t{n}", f"hada_w{n}") for n in (1, 2))
        return one * other
    if "hada_w1_a" in parts:
        first = parts["hada_w1_a"] @ parts["hada_w1_b"]
        return first * (parts["hada_w2_a"] @ parts["hada_w2_b"])
    left, right = (_whole(parts, f"lokr_w{n}") for n in (1, 2))
    return torch.kron(left, right)


def _whole(parts: Mapping[str, Tensor], name: str) -> Tensor:
    if name in parts:
        return parts[name].flatten(1)
    if name == "lokr_w2" and "lokr_t2" in parts:
        return _tucker(parts, "lokr_t2", name)
    return parts[f"{name}_a"] @ parts[f"{name}_b"].flatten(1)


def _tucker(parts: Mapping[str, Tensor], core: str, name: str) -> Tensor:
    """(outputs, inputs times pixels): a kernel (rank, rank, height, width) between two matrices,
    (rank, outputs) and (rank, inputs)."""
    whole = torch.einsum("ijhw,io,jn->onhw", parts[core], parts[f"{name}_a"], parts[f"{name}_b"])
    return whole.flatten(1)


def cayley_neumann(numbers: Tensor, size: int) -> Tensor:
    """(blocks, size, size), near to rotations: (I + Q)(I - Q)^-1 by the first terms of its series.

    `numbers` (blocks, size (size - 1) / 2) fill the upper triangle of the skew-symmetric Q.
    """
    rows, columns = torch.triu_indices(size, size, 1, device=numbers.device)
    q = numbers.new_zeros(numbers.shape[0], size, size)
    q[:, rows, columns] = numbers
    q = q - q.transpose(1, 2)
    power = torch.eye(size, dtype=q.dtype, device=q.device).expand_as(q)
    total = power.clone()
    for exponent in range(1, NEUMANN + 1):
        power = power @ q
        total += power * (1 if exponent == NEUMANN else 2)
    return total


def _rotated(matrix: Tensor, blocks: Tensor) -> Tensor:
    """W R^T, block by block: the layer's input x becomes x R. One block is shared by all."""
    size = blocks.shape[-1]
    cut = matrix.view(matrix.shape[0], -1, size)
    turned = torch.einsum("obk,bck->obc", cut, blocks.expand(cut.shape[1], size, size))
    return turned.reshape(matrix.shape)
