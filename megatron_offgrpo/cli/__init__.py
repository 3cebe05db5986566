"""`offgrpo`: one thin command per stage."""

import errno
import os
import sys
import time
from collections.abc import Callable
from typing import NoReturn

import typer

from checkpoints_conversion.cli import app as converters
from megatron_offgrpo.cli import data, evaluation, generation, launch, project, training
from megatron_offgrpo.cli.quiet import keep_quiet
from megatron_offgrpo.errors import OffgrpoError
from megatron_offgrpo.outcome import report_refusal

app = typer.Typer(
    help="Offline GRPO on Megatron-Core: prepare, plan, reference, train, convert, eval, report.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
OF_THE_STORAGE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO)
COMMANDS: dict[str, Callable[..., None]] = {
    "prepare": data.prepare,
    "inspect": data.inspect,
    "export": data.export,
    "plan": training.plan,
    "reference": training.reference,
    "train": training.train,
    "eval": evaluation.evaluate_command,
    "grade": evaluation.grade,
    "compare": evaluation.compare,
    "generate": generation.generate,
    "check-weights": generation.check_weights,
    "report": project.report,
    "chain": launch.chain,
    "launch": launch.launch,
    "jobs": launch.jobs,
    "check-node": launch.check_node,
    "doctor": project.doctor,
    "recipes": project.recipes,
    "quickstart": project.quickstart,
}
for name, function in COMMANDS.items():
    app.command(name)(function)
app.add_typer(converters, name="convert")


def main() -> None:
    """Entry point: a user's mistake, and a disk that is full or closed, are one line on standard error and status 1."""
    keep_quiet()
    try:
        app()
    except OffgrpoError as error:
        report_refusal(str(error))
        _fail(error)
    except OSError as cause:
        if cause.errno not in OF_THE_STORAGE:
            raise
        # Not a refusal: the same command may do once the disk is mended.
        where = str(cause.filename) if cause.filename else None
        remedy = "look at space, quota and permissions there; the same command goes on"
        _fail(OffgrpoError(f"the file system refuses ({cause.strerror})", where=where, remedy=remedy))


def _fail(error: OffgrpoError) -> NoReturn:
    rank = int(os.environ.get("RANK", "0"))
    if rank:
        # What is wrong for all ranks is said by the first; the launcher ends this one before it repeats it.
        time.sleep(3)
    print(f"{f'rank {rank}: ' if rank else ''}error: {error}", file=sys.stderr, flush=True)
    if "RANK" in os.environ:
        # Other ranks may hang in a collective; leave without waiting for them.
        os._exit(1)
    sys.exit(1)
