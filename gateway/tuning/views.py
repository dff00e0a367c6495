"""Files, jobs, events and checkpoints as OpenAI's objects. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gateway.tuning.records import Checkpoint, Event, File, Job
from gateway.tuning.request import ORGANIZATION


def page(data: Sequence[dict[str, Any]], has_more: bool) -> dict[str, Any]:
    """A page of a list."""
    ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {"first_id": None, "last_id": None}
    return {"object": "list", "data": list(data), "has_more": has_more, **ends}


def file(file: File) -> dict[str, Any]:
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.size_bytes,
        "created_at": file.created_at,
        "expires_at": file.expires_at,
        "filename": file.filename,
        "purpose": file.purpose,
        "status": file.status,
        "status_details": None,
    }


def job(job: Job) -> dict[str, Any]:
    supervised = job.method == "supervised"
    settings = {"hyperparameters": job.hyperparameters} | ({"grader": job.grader} if job.grader else {})
    error = {"code": job.error.code, "message": job.error.message, "param": job.error.param} if job.error else None
    return {
        "id": job.id,
        "object": "fine_tuning.job",
        "created_at": job.created_at,
        "estimated_finish": job.estimated_finish,
        "finished_at": job.finished_at,
        "model": job.model,
        "fine_tuned_model": job.fine_tuned_model,
        "organization_id": f"org-{ORGANIZATION}",
        "status": job.status,
        "training_file": job.training_file,
        "validation_file": job.validation_file,
        "result_files": list(job.result_files),
        "trained_tokens": job.trained_tokens,
        "error": error,
        "hyperparameters": job.hyperparameters if supervised else {},
        "method": {"type": job.method, job.method: settings},
        "seed": job.seed,
        "integrations": [],
        "metadata": job.metadata,
        "tunegate": job.settings | ({"paused_for": "serving"} if job.held else {}),
    }


def event(event: Event) -> dict[str, Any]:
    return {
        "id": f"ftevent-{event.number}",
        "object": "fine_tuning.job.event",
        "created_at": event.created_at,
        "level": event.level,
        "message": event.message,
        "type": event.type,
        "data": event.data,
    }


def checkpoint(job_id: str, checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "id": checkpoint.id,
        "object": "fine_tuning.job.checkpoint",
        "created_at": checkpoint.created_at,
        "fine_tuned_model_checkpoint": checkpoint.model,
        "fine_tuning_job_id": job_id,
        "metrics": checkpoint.metrics,
        "step_number": checkpoint.step,
    }
