"""Stands in for `torchvision`; see tunegate_sglang_cpu."""

from tunegate_sglang_cpu import stand_in

__version__ = "0.0.0+standin"
__getattr__ = stand_in("torchvision")
