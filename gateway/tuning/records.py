"""What is kept of files, jobs and batches, as immutable values. Times are seconds since the epoch."""

from __future__ import annotations

import secrets
from enum import StrEnum
from typing import Any, Literal

import msgspec


class File(msgspec.Struct, frozen=True, kw_only=True):
    """A file; its bytes lie in the files' directory under its id."""

    id: str
    created_at: int
    filename: str
    purpose: str
    size_bytes: int
    expires_at: int | None = None
    key_id: str = ""  # who sent it, or ordered what it holds; "" where access is open
    status: str = "processed"


class Status(StrEnum):
    """Of a job. Until it is succeeded, failed or cancelled, the gateway works on it or waits to."""

    QUEUED = "queued"
    RUNNING = "running"
    PAUSED = "paused"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def over(self) -> bool:
        """Whether nothing follows."""
        return self in (Status.SUCCEEDED, Status.FAILED, Status.CANCELLED)


class Fault(msgspec.Struct, frozen=True):
    """Why a job failed."""

    code: str
    message: str
    param: str | None = None


class Checkpoint(msgspec.Struct, frozen=True):
    """A step of a job that can be called as a model."""

    id: str
    created_at: int
    model: str
    step: int
    metrics: dict[str, float]


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """A fine-tuning job."""

    id: str
    created_at: int
    status: Status
    model: str  # the base's public name
    training_file: str
    validation_file: str | None
    method: Literal["supervised", "dpo", "reinforcement"]
    hyperparameters: dict[str, Any]  # in force: nothing is `auto` any more
    settings: dict[str, Any]  # the `tunegate` object, as given
    seed: int
    name: str  # of the model to come
    config: dict[str, Any]  # what the trainer is told, but for paths
    gate_eval_loss: bool
    grader: dict[str, Any] | None = None  # of reinforcement
    key_id: str = ""  # who ordered it; "" where access is open
    pass_digest: str = ""  # of the secret by which its trainer calls the gateway
    held: bool = False  # paused by the gateway, which lets it go on when requests no longer queue
    metadata: dict[str, str] | None = None
    fine_tuned_model: str | None = None
    finished_at: int | None = None
    estimated_finish: int | None = None
    trained_tokens: int | None = None
    error: Fault | None = None
    result_files: tuple[str, ...] = ()
    checkpoints: tuple[Checkpoint, ...] = ()
    total_steps: int = 0  # 0 until the trainer has begun
    step: int = 0  # the last that was done
    reached_step: int = 0  # by the trainer's processes before this one
    log_bytes: int = 0  # of the trainer's log, read so far


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """A line of a job's story."""

    created_at: int
    message: str
    level: Literal["info", "warn", "error"] = "info"
    type: Literal["message", "metrics"] = "message"
    data: dict[str, Any] = {}
    number: int = 0  # given by the store


def new_id(prefix: str) -> str:
    """An id that nobody guesses, as OpenAI's look: letters and digits after a prefix."""
    return prefix + secrets.token_hex(12)
