"""The folder of a run's checkpoints, without a model: which is newest, which is whole, which go.

FOLDER/latest_checkpointed_iteration.txt    "release" (converted weights) or the iteration
FOLDER/iter_0000010/                        .metadata, *.distcp, common.pt, metadata.json, manifest.json
FOLDER/best.json                            {"iteration": 10, metric: value}, where validation keeps a best one
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from checkpoints_conversion.safe_metadata import read_common, read_metadata
from megatron_offgrpo.artifacts import MANIFEST, Manifest, read_manifest, write_json_atomically
from megatron_offgrpo.errors import CheckpointError

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"
BEST_FILE = "best.json"
TEMPORARY = ".iter_*.tmp"


def iteration_folder(folder: Path, iteration: int | None) -> Path:
    """The folder of one checkpoint; None is the converted, untrained one."""
    return folder / (RELEASE if iteration is None else f"iter_{iteration:07d}")


def latest(folder: Path) -> Path | None:
    """The newest finished checkpoint in `folder`, or None where there is no checkpoint.

    Raises:
        CheckpointError: the tracker names a checkpoint that is not there.
    """
    tracker = Path(folder) / TRACKER
    if not tracker.exists():
        return None
    name = tracker.read_text(encoding="utf-8").strip()
    if name != RELEASE and not name.isdigit():
        raise CheckpointError("not an iteration", where=str(tracker), expected="a number or 'release'", got=name)
    found = iteration_folder(Path(folder), None if name == RELEASE else int(name))
    if not found.is_dir():
        raise CheckpointError(
            "the newest checkpoint is missing",
            where=str(tracker),
            expected=str(found),
            remedy="write the number of a checkpoint that exists into this file",
        )
    return found


def candidates(folder: Path) -> list[Path]:
    """The checkpoints that a run may go on from: the newest one named by the tracker, then older ones."""
    newest = latest(folder)
    if newest is None:
        return []
    older = [path for path in sorted(folder.glob("iter_*"), reverse=True) if path.name < newest.name]
    return [newest, *older]


def require_latest(folder: str | Path) -> tuple[Path, Manifest]:
    """The newest checkpoint in `folder` and its manifest, with its files checked against it.

    Raises:
        CheckpointError: none there, or a file is missing or has another size than when it was written.
    """
    remedy = f"offgrpo convert hf-to-megatron --hf HF_DIR --megatron {folder}"
    checkpoint = latest(Path(folder))
    if checkpoint is None:
        raise CheckpointError("no checkpoint here", where=str(folder), expected=TRACKER, remedy=remedy)
    return checkpoint, verified_manifest(checkpoint, remedy)


def verified_manifest(checkpoint: Path, remedy: str, *, part: int = 0, parts: int = 1) -> Manifest:
    """The checkpoint's manifest, after its files were compared with it: lengths, and SHA-256 where it has them.

    Args:
        part, parts: of the files, sorted by name, only every `parts`-th from `part` on is read for its checksum, so
            that ranks share the work; lengths are compared for all.
    """
    manifest = read_manifest(checkpoint, "checkpoint", remedy=remedy)
    remedy = f"delete {checkpoint} and use an older checkpoint, or: {remedy}"
    for name, size in manifest.counts.get("file_bytes", {}).items():
        path = checkpoint / name
        got = path.stat().st_size if path.exists() else None
        if got != size:
            raise CheckpointError(
                "truncated checkpoint",
                where=str(path),
                expected=f"{size} bytes",
                got="no file" if got is None else f"{got} bytes",
                remedy=remedy,
            )
    for name, wanted in sorted(manifest.counts.get("file_sha256", {}).items())[part::parts]:
        found = sha256_of(checkpoint / name)
        if found != wanted:
            raise CheckpointError(
                "damaged checkpoint", where=str(checkpoint / name), expected=wanted, got=found, remedy=remedy
            )
    # Both are pickles: what they may hold is checked before Megatron reads them.
    read_metadata(checkpoint)
    read_common(checkpoint)
    return manifest


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_of(checkpoint: Path) -> list[Path]:
    """Every file of a checkpoint but its manifest, sorted."""
    return [path for path in sorted(checkpoint.iterdir()) if path.name != MANIFEST]


def write_tracker(folder: Path, content: str) -> None:
    """Points the folder at its newest checkpoint, atomically."""
    temporary = folder / f".{TRACKER}.tmp"
    temporary.write_text(content + "\n", encoding="utf-8")
    os.replace(temporary, folder / TRACKER)


def read_best(folder: Path) -> dict[str, Any] | None:
    """{"iteration": ..., metric: value} of the best checkpoint so far, or None."""
    path = folder / BEST_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def write_best(folder: Path, iteration: int, metric: str, value: float) -> None:
    """Names the best checkpoint, which `remove_old` keeps."""
    write_json_atomically(folder / BEST_FILE, {"iteration": iteration, metric: value})


def remove_old(folder: Path, keep: int) -> None:
    """Deletes all but the `keep` newest checkpoints and the best one; 0 keeps all."""
    best = read_best(folder)
    spared = {iteration_folder(folder, best["iteration"])} if best else set()
    if keep:
        for old in sorted(folder.glob("iter_*"))[:-keep]:
            if old not in spared:
                shutil.rmtree(old)


def take_place(temporary: Path, target: Path) -> None:
    """Gives a complete checkpoint its name; one that has the name already goes, and is found again after a kill."""
    if target.exists():
        old = target.with_name(f".{target.name}.old.tmp")
        os.replace(target, old)
        os.replace(temporary, target)
        shutil.rmtree(old)
    else:
        os.replace(temporary, target)


def remove_unfinished(folder: Path) -> None:
    """Deletes what saves that were cut off have left; what a kill in `take_place` left takes its place first."""
    tracker = folder / TRACKER
    newest = tracker.read_text(encoding="utf-8").strip() if tracker.exists() else ""
    # The new one's name has a number where the old one's has "old".
    for path in sorted(folder.glob(TEMPORARY)):
        target = iteration_folder(folder, int(path.name.split(".")[1].removeprefix("iter_")))
        if (path / MANIFEST).exists() and target.name == f"iter_{newest:0>7}" and not target.exists():
            os.replace(path, target)
        else:
            shutil.rmtree(path, ignore_errors=True)


def require_room(folder: Path, num_bytes: int) -> None:
    """Refuses a save that the disk has no room for.

    Raises:
        CheckpointError: less free space than `num_bytes` and a twentieth of it.
    """
    free, wanted = shutil.disk_usage(folder).free, num_bytes + num_bytes // 20
    if free < wanted:
        raise CheckpointError(
            "no room for a checkpoint",
            where=str(folder),
            expected=f"{wanted:,} bytes free",
            got=f"{free:,} bytes",
            remedy="free space there, or lower checkpoint.keep",
        )
