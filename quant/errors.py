"""Every failure a user of quantization can meet. A message says what was found, what is allowed and what to do.

QuantError
├── BadCheckpoint      missing, truncated or non-finite weights; files that disagree with each other
├── UnsupportedModel   a structure or a format that cannot be quantized (or already is)
├── BadCalibration     no usable calibration text
├── BadAdapter         not a plain LoRA of this model
├── NotServed          the engine did not come up, or did not answer
├── BadDevice          a device that torch does not know or see
├── NotExact           a conversion that would change weights
├── JobConflict        the output exists, or its unfinished work belongs to another job
├── RankLost           another process of a job of several ended
└── BadHessian         calibration statistics GPTQ cannot solve with (caught: that group falls back to RTN)
"""

from __future__ import annotations


class QuantError(Exception):
    """Base of all errors shown to the user of `quantize`."""


class BadCheckpoint(QuantError):
    """The checkpoint's files are missing, truncated, non-finite or contradict each other."""


class UnsupportedModel(QuantError):
    """The model is of a structure or format that cannot be quantized, or it already is."""


class BadCalibration(QuantError):
    """The calibration data cannot be used."""


class BadAdapter(QuantError):
    """The adapter is not a plain LoRA of this model, or its files cannot be read."""


class NotServed(QuantError):
    """The engine did not come up with the checkpoint, or did not answer."""


class BadDevice(QuantError):
    """The device asked for is none that torch knows, or sees on this machine."""


class NotExact(QuantError):
    """The conversion asked for would change weights."""


class JobConflict(QuantError):
    """The output directory exists, or holds the unfinished work of another job."""


class RankLost(QuantError):
    """Another process of the same job ended, or cannot be reached."""


class BadHessian(QuantError):
    """The second moments of a layer's inputs are not finite, or not positive definite even when damped."""
