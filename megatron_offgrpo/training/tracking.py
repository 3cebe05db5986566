"""Weights & Biases, where the run asks for it: the lines of metrics.jsonl once more, on a server.

The id of the W&B run lies in the run's folder, so that a resumed run continues its curves, which are drawn over the
logged `step`. W&B keeps what it has been sent: a step that is computed again after a kill or a rollback stands in its
history twice, in metrics.jsonl and TensorBoard once.
"""

import importlib.util
import secrets
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_offgrpo.artifacts import Manifest
from megatron_offgrpo.config import TrackingConfig
from megatron_offgrpo.errors import ConfigError
from megatron_offgrpo.progress import say

RUN_ID_FILE = "wandb_run_id.txt"
CONNECT_SECONDS = 60.0
UPLOAD_SECONDS = 60.0
"""What is not with the server so long after the last step stays in OUTPUT/wandb, for `wandb sync`."""


def require_tracking(settings: TrackingConfig) -> None:
    """Refuses W&B where its package is not installed; every rank asks before the run begins.

    Raises:
        ConfigError: with the command that installs it.
    """
    if settings.wandb_project and importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            "the package wandb is not installed",
            where="tracking.wandb_project",
            got=settings.wandb_project,
            remedy='pip install "megatron_offgrpo[tracking]", or --set tracking.wandb_project=',
        )


class Tracking:
    """The run on W&B, or nothing where there is no project; a context manager of one process."""

    def __init__(self, folder: Path, settings: TrackingConfig, manifest: Manifest) -> None:
        self._run: Any = None
        if settings.wandb_project:
            self._run = _start(folder, settings, manifest)

    def __enter__(self) -> "Tracking":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._run is not None:
            self._try(lambda: self._run.finish(exit_code=0 if kind is None else 1))

    def write(self, values: dict[str, float]) -> None:
        """Sends one step; `values` holds `step`."""
        if self._run is not None:
            self._try(lambda: self._run.log(values))

    def _try(self, call: Callable[[], object]) -> None:
        """What goes wrong over there must not end a run that trains: it is said, and nothing more is sent."""
        try:
            call()
        except Exception as cause:
            self._run = None
            say(f"train: W&B has failed ({cause}); training goes on without it")


def _start(folder: Path, settings: TrackingConfig, manifest: Manifest) -> Any:
    """The W&B run; a server that does not answer is said, and the run is then kept on disk for `wandb sync`.

    Raises:
        ConfigError: W&B refuses the settings or knows no API key.
    """
    import wandb

    def begin(mode: str | None) -> Any:
        return wandb.init(
            project=settings.wandb_project,
            id=_run_id(folder),
            resume="allow",
            name=str(manifest.config["name"]),
            config=manifest.config,
            dir=str(folder),
            mode=mode,
            settings=wandb.Settings(
                console="off", quiet=True, init_timeout=CONNECT_SECONDS, finish_timeout=UPLOAD_SECONDS
            ),
        )

    try:
        run = begin(None)
    except (wandb.errors.UsageError, wandb.errors.AuthenticationError) as cause:
        raise ConfigError(
            f"W&B refuses ({cause})", where="tracking.wandb_project", remedy="wandb login, or WANDB_MODE=offline"
        ) from None
    except wandb.errors.Error as cause:
        say(f"train: W&B does not answer ({cause}); the run is kept in {folder / 'wandb'}, for `wandb sync`")
        wandb.teardown()  # it still holds the run's id
        run = begin("offline")
    run.define_metric("*", step_metric="step")
    return run


def _run_id(folder: Path) -> str:
    path = folder / RUN_ID_FILE
    if not path.exists():
        path.write_text(secrets.token_hex(8) + "\n", encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()
