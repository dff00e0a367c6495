"""What a step costs in floating-point operations, and what the device could do at best: their ratio is the MFU."""

from __future__ import annotations

import torch

from trainer import ranks
from trainer.learner import Learner

# Dense bfloat16 TFLOP/s by the vendor's data sheet, by the first name that the device's own name contains.
_PEAK_TFLOPS = {
    "B200": 2250.0,
    "H20 ": 148.0,
    "H100 PCIe": 756.0,
    "H100": 989.4,
    "H200": 989.4,
    "GH200": 989.4,
    "A100": 312.0,
    "A800": 312.0,
    "A40": 149.7,
    "A10G": 70.0,
    "A10": 125.0,
    "L40S": 362.0,
    "L4": 121.0,
    "RTX 4090": 165.2,
}


def best_tokens_per_s(learner: Learner) -> float | None:
    """Tokens a second at 100 % of the devices' peak, one a process; None where the peak is not known.

    Counted: 2 operations a weight for the forward pass and 2 for the gradients of activations; full-parameter training
    2 more. Attention and what a method computes besides (references, samples) are left out, so MFU is never flattered.
    """
    device = learner.base.device
    if device.type != "cuda" or learner.base.dtype != torch.bfloat16:
        return None
    name = torch.cuda.get_device_name(device)
    peak_tflops = next((tflops for key, tflops in _PEAK_TFLOPS.items() if key in f"{name} "), None)
    if peak_tflops is None:
        return None
    return ranks.count() * peak_tflops * 1e12 / ((4 if learner.adapter else 6) * learner.base.multiplied_weights())
