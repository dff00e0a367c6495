"""The process of one stage: `python -m scripts.gpu_suite.child STAGE OPTIONS_AS_JSON`, started by `runner.py`."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import traceback
from types import FrameType

from backends.lifeline import end_with_parent
from scripts.gpu_suite import quiet, table
from scripts.gpu_suite.report import Report
from scripts.gpu_suite.stages import Options


def main() -> int:
    """Exit status 0 when every check passed."""
    name, options = sys.argv[1], Options.from_json(json.loads(sys.argv[2]))
    report = Report(name, folder=options.out)

    def end_group(number: int, frame: FrameType | None) -> None:
        """The suite has ended, or ends this stage: what the stage started ends too."""
        signal.signal(number, signal.SIG_DFL)
        report.keep()
        os.killpg(0, number)

    signal.signal(signal.SIGTERM, end_group)
    end_with_parent(signal.SIGTERM, os.getppid())
    folder = options.out / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        stage = table.stages(options).stages[name]
        with contextlib.nullcontext() if stage.in_turn else quiet.busy(options.out, name):
            stage.job(report, options, folder)
    except Exception as error:  # whatever it is, what the stage saw before is written down
        traceback.print_exc()
        with report.check("the stage ran to its end"):
            raise AssertionError(f"{type(error).__name__}: {error}") from error
    report.save()
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
