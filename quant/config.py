"""What to quantize and how: the options of a job and the integer grid. Imports neither torch nor transformers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Method = Literal["rtn", "awq", "gptq"]
Format = Literal["awq", "gptq", "compressed-tensors"]

METHODS: tuple[Method, ...] = ("rtn", "awq", "gptq")
FORMATS: tuple[Format, ...] = ("awq", "gptq", "compressed-tensors")
GROUP_SIZES = (32, 64, 128)

# AWQ-gemm is the one layout that all engines take; GPTQ weights are stored symmetric because engines refuse others.
DEFAULT_FORMAT: dict[Method, Format] = {"rtn": "awq", "awq": "awq", "gptq": "gptq"}


class Grid(BaseModel):
    """The integers a weight may become: w = (q - zero) * scale, one scale and zero per `group_size` inputs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bits: Literal[4, 8] = 4
    group_size: int = Field(default=128, ge=8)  # input channels that share a scale
    symmetric: bool = False  # zero is fixed to the middle

    @property
    def max_level(self) -> int:
        """The largest stored integer: 15 for 4 bits."""
        return int(2**self.bits - 1)

    @property
    def middle(self) -> int:
        """The zero point of a symmetric grid: 8 for 4 bits."""
        return int(2 ** (self.bits - 1))


class QuantOptions(BaseModel):
    """One quantization job. Everything here except `device` and `batch_tokens` changes the result."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: Path
    method: Method = "rtn"
    format: Format
    grid: Grid
    calib: Path | None = None  # JSONL of chats or texts; None: the bundled texts
    calib_samples: int = Field(default=128, ge=0)  # sequences; 0: no calibration, RTN only
    calib_tokens: int = Field(default=512, ge=8)  # tokens of one sequence
    skip: tuple[str, ...] = ()  # regular expressions of module names to leave alone
    damping: float = Field(default=0.01, gt=0, lt=1)  # GPTQ: share of the mean Hessian diagonal added to it
    seed: int = 0
    device: str = "auto"
    batch_tokens: int = Field(default=4096, ge=1)  # tokens in one forward pass of a layer

    @model_validator(mode="after")
    def _check(self) -> QuantOptions:
        grid, form = self.grid, self.format
        if form == "awq" and grid.bits != 4:
            raise ValueError(f"the awq format holds 4 bits, not {grid.bits}: use gptq or compressed-tensors")
        if form == "gptq" and not grid.symmetric:
            raise ValueError("the gptq format is written symmetric: vLLM and SGLang refuse anything else")
        for pattern in self.skip:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"skip: {pattern!r} is no regular expression: {error}") from error
        if self.calib_samples == 0 and self.method != "rtn":
            raise ValueError(f"{self.method} needs calibration: set calib_samples above 0, or use method rtn")
        return self


def default_symmetric(form: Format) -> bool:
    """Whether the grid is symmetric unless the user says: AWQ stores zero points, the other two formats do not."""
    return form != "awq"
