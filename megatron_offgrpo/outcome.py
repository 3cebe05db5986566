"""What a command tells the batch script that runs it: one line in the file named by `OFFGRPO_OUTCOME`.

An exit status does not suffice: srun gives the highest of all ranks, and a rank that is ended because another one
failed hides the status of the first. `slurm/common.sh` reads the file and decides whether to queue the job again.
"""

import os
from pathlib import Path

from megatron_offgrpo.progress import say

VARIABLE = "OFFGRPO_OUTCOME"


def report_step(step: int, total: int) -> None:
    """`step STEP TOTAL`: all up to `step` is saved; equal numbers mean that the run is finished."""
    _write(f"step {step} {total}")


def report_refusal(message: str) -> None:
    """`refused MESSAGE`: the user has to mend something, another attempt would end the same way."""
    _write(f"refused {' '.join(message.split())}")


def _write(line: str) -> None:
    name = os.environ.get(VARIABLE)
    if name:
        temporary = Path(f"{name}.{os.getpid()}.tmp")
        try:
            temporary.write_text(line + "\n", encoding="utf-8")
            os.replace(temporary, name)
        except OSError as cause:
            # A full disk must not end a run that trains.
            say(f"{name} cannot be written ({cause.strerror}): the batch script does not learn of: {line}")
