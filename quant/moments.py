"""What calibration remembers of a linear's inputs: second moments, no activations.

Legend: T tokens, K input channels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_STRIPES = 4  # of the upper triangle: 5/8 of the whole product, in pieces that are still large


class LastSiteReached(Exception):
    """All that is listened for has been heard: the rest of the layer need not run."""


@dataclass(slots=True)
class Moments:
    """Sums over the calibration tokens that reached one input."""

    tokens: int
    square_K: Tensor  # sum of x_k^2, float32
    abs_K: Tensor  # sum of |x_k|, float32
    gram_KK: Tensor | None  # sum of x x^T, float32; None when only the diagonal is asked for

    @classmethod
    def zeros(cls, channels: int, device: torch.device, full: bool) -> Moments:
        gram_KK = torch.zeros(channels, channels, device=device) if full else None
        return cls(0, torch.zeros(channels, device=device), torch.zeros(channels, device=device), gram_KK)

    def add(self, x: Tensor) -> None:
        """Count a batch of inputs [..., K]."""
        x_TK = x.reshape(-1, x.shape[-1]).float()
        self.tokens += x_TK.shape[0]
        self.square_K += x_TK.square().sum(0)
        self.abs_K += x_TK.abs().sum(0)
        if self.gram_KK is not None:
            width = -(-x_TK.shape[1] // _STRIPES)
            for start in range(0, x_TK.shape[1], width):
                stripe_Kk = x_TK[:, start : start + width].t()
                self.gram_KK[start : start + width, start:].addmm_(stripe_Kk, x_TK[:, start:])

    def mirror(self) -> None:
        """Fill the lower triangle, which `add` leaves out, from the upper."""
        if self.gram_KK is not None:
            self.gram_KK.triu_().add_(self.gram_KK.triu(1).t())

    @property
    def mean_square_K(self) -> Tensor:
        return self.square_K / max(self.tokens, 1)

    @property
    def mean_abs_K(self) -> Tensor:
        return self.abs_K / max(self.tokens, 1)

    @property
    def mean_gram_KK(self) -> Tensor:
        assert self.gram_KK is not None
        return self.gram_KK / max(self.tokens, 1)


@contextlib.contextmanager
def gathering(
    layer: nn.Module, sites: Sequence[str], full: bool, last: str | None = None
) -> Iterator[dict[str, Moments]]:
    """Inside, every run of `layer` adds to the moments of the inputs of the modules named `sites`.

    A site that no token reaches (an expert) has no entry. last: the site that every run reaches after all others; a run
    ends there with LastSiteReached. The second moments are whole only after the block.
    """
    moments: dict[str, Moments] = {}
    handles = []
    for site in sites:

        def listen(_module: nn.Module, inputs: tuple[Tensor, ...], site: str = site) -> None:
            x = inputs[0]
            if site not in moments:
                moments[site] = Moments.zeros(x.shape[-1], x.device, full)
            moments[site].add(x)
            if site == last:
                raise LastSiteReached

        handles.append(layer.get_submodule(site).register_forward_pre_hook(listen))
    try:
        yield moments
    finally:
        for handle in handles:
            handle.remove()
    for one in moments.values():
        one.mirror()
