"""The folder of a run's checkpoints, without a model: which is newest, which is whole, which go.

FOLDER/latest_checkpointed_iteration.txt    "release" (converted weights) or the iteration
FOLDER/iter_0000010/                        .metadata, *.distcp, common.pt, metadata.json, manifest.json
FOLDER/best.json                            {"iteration": 10, metric: value}, where validation keeps a best one
"""

import errno
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from checkpoints_conversion.safe_metadata import read_common, read_metadata
from megatron_offgrpo.artifacts import MANIFEST, Manifest, read_manifest, write_json_atomically
from megatron_offgrpo.errors import CheckpointError
from megatron_offgrpo.progress import say

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
        raise CheckpointError("not an iteration", where=str(tracker), expected="a number or 'release'", got=repr(name))
    found = iteration_folder(Path(folder), None if name == RELEASE else int(name))
    if not found.is_dir():
        raise CheckpointError(
            "the newest checkpoint is missing",
            where=str(tracker),
            expected=str(found),
            remedy="write the number of a checkpoint that exists into this file",
        )
    return found


def candidates(folder: Path) -> tuple[list[Path], str | None]:
    """The checkpoints that a run may go on from, newest first, and what is wrong with the tracker, or None.

    Newer ones than the tracker names do not count: the run had left them when the tracker was written. Where it names
    none that is there, all count.
    """
    tracker = folder / TRACKER
    there = sorted(_iterations(folder).items(), reverse=True)
    text = tracker.read_text(encoding="utf-8", errors="replace").strip() if tracker.exists() else None
    named = int(text) if text is not None and text.isdecimal() else None
    if named in dict(there):
        return [path for iteration, path in there if named is not None and iteration <= named], None
    found = [path for _, path in there]
    if text is None:
        return found, f"{tracker} is missing" if found else None
    return found, f"{tracker} names no checkpoint that is there: got {text[:40]!r}"


def _iterations(folder: Path) -> dict[int, Path]:
    """Iteration -> folder, of all finished checkpoints of a run."""
    numbered = ((path.name.removeprefix("iter_"), path) for path in folder.glob("iter_*"))
    return {int(number): path for number, path in numbered if number.isdecimal()}


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
    # Both are pickles: one that holds more than it may is passed over like a damaged one, not met while loading.
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
    sync(temporary)
    os.replace(temporary, folder / TRACKER)
    sync(folder)


def sync(path: Path) -> None:
    """Waits until a file's content, or a folder's list of names, would outlast a power loss."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as cause:
        # Some network file systems cannot do it for a folder; then there is nothing to wait for.
        if not path.is_dir() or cause.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def read_best(folder: Path) -> dict[str, Any] | None:
    """{"iteration": ..., metric: value} of the best checkpoint so far, or None."""
    path = folder / BEST_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def write_best(folder: Path, iteration: int, metric: str, value: float) -> None:
    """Names the best checkpoint, which `remove_old` keeps."""
    write_json_atomically(folder / BEST_FILE, {"iteration": iteration, metric: value})


def best_up_to(folder: Path, iteration: int) -> dict[str, Any] | None:
    """`read_best` for a run that goes on from `iteration`; what cannot hold there is forgotten, on disk too."""
    try:
        best = read_best(folder)
        if best is None or (best["iteration"] <= iteration and iteration_folder(folder, best["iteration"]).is_dir()):
            return best
        reason = f"iteration {best['iteration']} is not there, or newer than {iteration}, where the run goes on"
    except (ValueError, TypeError, KeyError) as cause:
        reason = f"unreadable ({cause})"
    say(f"train: forgot the best checkpoint: {folder / BEST_FILE}: {reason}; the next validation finds one")
    (folder / BEST_FILE).unlink()
    return None


def remove_old(folder: Path, keep: int, newest: int) -> None:
    """Deletes all but the `keep` newest checkpoints up to `newest` and the best one; 0 keeps all of these.

    Newer ones than `newest`, which has just been written, go in any case: the run went back to before them, so that
    they are damaged, or belong to another past.
    """
    best = read_best(folder)
    there = _iterations(folder)
    up_to_newest = sorted(iteration for iteration in there if iteration <= newest)
    kept = {*up_to_newest[-keep:], *([best["iteration"]] if best else [])}
    for iteration, path in there.items():
        if iteration > newest:
            say(f"train: deletes {path}: the run went back to before it and has now saved {newest}")
        if iteration > newest or iteration not in kept:
            shutil.rmtree(path)


def take_place(temporary: Path, target: Path) -> None:
    """Gives a complete checkpoint its name; one that has the name already goes, and is found again after a kill."""
    # Megatron itself waits for the tensors' files.
    for path in (temporary / "common.pt", temporary / "metadata.json", temporary):
        if path.exists():
            sync(path)
    if target.exists():
        old = target.with_name(f".{target.name}.old.tmp")
        os.replace(target, old)
        os.replace(temporary, target)
        sync(target.parent)
        shutil.rmtree(old)
    else:
        os.replace(temporary, target)
        sync(target.parent)


def remove_unfinished(folder: Path) -> None:
    """Deletes what saves that were cut off have left; what a kill in `take_place` left takes its place first."""
    replaced = {path.name.split(".")[1] for path in folder.glob(".iter_*.old.tmp")}
    # The new one's name has a number where the old one's has "old".
    for path in sorted(folder.glob(TEMPORARY)):
        target = folder / path.name.split(".")[1]
        if (path / MANIFEST).exists() and target.name in replaced and not target.exists():
            os.replace(path, target)
        else:
            shutil.rmtree(path, ignore_errors=True)


def require_folder(folder: Path) -> None:
    """Refuses a folder that has gone; it is not made again: after an unmount it would fill the disk of this node.

    Raises:
        CheckpointError: it has gone.
    """
    if not folder.is_dir():
        raise CheckpointError(
            "the folder of the checkpoints has gone", where=str(folder), remedy="mount or make it again"
        )


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
