"""Every failure a user of the trainer can meet; the message says what was given, what is allowed, what to do.

TrainError
├── ConfigError        a flag or key
├── DataError          training data; names the lines
│   └── RowError       one row, before its line number is known
├── ModelError         the base model cannot be loaded or adapted
├── CheckpointError    a checkpoint cannot be written or read
├── RunError           the run directory is in use, finished or not one
├── RolloutError       the gateway did not sample
├── RewardError        a reward function failed
└── DivergedError      loss or gradients stay non-finite
"""

from __future__ import annotations

# A note on an error that the first process of a run meets too, and tells.
TOLD = "told by the first process"


class TrainError(Exception):
    """Base of all errors shown to the user as one message."""


class ConfigError(TrainError):
    """The configuration cannot be used; the message lists every fault, one a line."""


class DataError(TrainError):
    """The training data cannot be used; the message names file and line of each fault."""


class RowError(DataError):
    """One row cannot be used. The reader adds file and line."""


class ModelError(TrainError):
    """The base model cannot be loaded, or not be trained in the way asked for."""


class CheckpointError(TrainError):
    """A checkpoint could not be written or is not whole."""


class RunError(TrainError):
    """The run directory cannot be used as asked."""


class RolloutError(TrainError):
    """The gateway cannot be reached, or did not give what was asked of it."""


class RewardError(TrainError):
    """A reward function failed, took too long, or returned no numbers."""


class DivergedError(TrainError):
    """Training has left the finite numbers; the last good checkpoint is kept."""
