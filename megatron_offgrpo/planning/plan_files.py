"""A PLAN on disk: writes it, reads it, and refuses one that was made with other settings than the run's."""

import zipfile
import zlib
from pathlib import Path

import numpy as np

from megatron_offgrpo.artifacts import atomic_folder, read_manifest, write_manifest
from megatron_offgrpo.config import ObjectiveConfig, PlanConfig
from megatron_offgrpo.errors import DataError
from megatron_offgrpo.planning.plan import ARRAYS, Plan, arrays_fingerprint
from megatron_offgrpo.planning.settings import plan_settings

ARRAYS_FILE = "plan.npz"
REMEDY = "offgrpo plan RECIPE"


def save_plan(plan: Plan, path: str | Path) -> None:
    """Writes the plan as a folder that appears only when it is complete."""
    with atomic_folder(Path(path)) as folder:
        np.savez(folder / ARRAYS_FILE, **{name: getattr(plan, name) for name in ARRAYS})
        write_manifest(folder, plan.manifest)


def load_plan(path: str | Path, *, remedy: str = REMEDY) -> Plan:
    """Reads a plan.

    Args:
        remedy: the command that makes it.

    Raises:
        DataError: no finished plan there, or its arrays are damaged.
    """
    folder = Path(path)
    manifest = read_manifest(folder, "plan", remedy=remedy)
    file = folder / ARRAYS_FILE
    try:
        with np.load(file, allow_pickle=False) as arrays_file:
            arrays = {name: arrays_file[name] for name in ARRAYS}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as cause:
        raise DataError(f"unreadable plan ({cause})", where=str(file), remedy=remedy) from None
    if arrays_fingerprint(arrays) != manifest.fingerprint:
        raise DataError(
            "the plan's arrays do not fit its manifest",
            where=str(file),
            expected=f"fingerprint {manifest.fingerprint}",
            got=arrays_fingerprint(arrays),
            remedy=remedy,
        )
    return Plan(manifest=manifest, **arrays)


def require_settings(
    plan: Plan, plan_config: PlanConfig, objective: ObjectiveConfig, *, where: str, remedy: str = REMEDY
) -> None:
    """Refuses a plan that was made with other settings than the run's.

    Args:
        remedy: the command that makes it.

    Raises:
        DataError: naming the first differing field with both values.
    """
    wanted = plan_settings(plan_config, objective)
    for section, values in wanted.items():
        for name, value in values.items():
            recorded = plan.manifest.config.get(section, {}).get(name)
            if recorded != value:
                raise DataError(
                    f"this plan was made with another {section}.{name}",
                    where=where,
                    expected=value,
                    got=recorded,
                    remedy=remedy,
                )
