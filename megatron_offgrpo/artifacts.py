"""Artefacts on disk: a folder with a `manifest.json` that says what it is and what it was made from."""

import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_offgrpo import __version__
from megatron_offgrpo.errors import CheckpointError, DataError

Kind = Literal["store", "checkpoint", "reference", "plan", "run", "evaluation", "groups"]
FORMAT_VERSION = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Manifest:
    """What an artefact is, and what it was made from."""

    kind: Kind
    fingerprint: str
    """Identifies the content; see `fingerprint_of`."""
    inputs: dict[str, str] = field(default_factory=dict)
    """Name of each input artefact (store, weights, tokenizer, plan, ...) -> its fingerprint."""
    counts: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    command: list[str] = field(default_factory=lambda: list(sys.argv))
    code_version: str = __version__
    format_version: int = FORMAT_VERSION


def fingerprint_of(*parts: object) -> str:
    """SHA-256 (32 hex digits) over bytes and JSON-able parts, in order; the length of each part is hashed too."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, bytes | bytearray | memoryview):
            data = bytes(part)
        else:
            data = json.dumps(part, sort_keys=True, ensure_ascii=False).encode()
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()[:32]


def fingerprint_of_file(path: Path) -> str:
    """SHA-256 (32 hex digits) of a file's bytes, read in chunks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:32]


def fingerprint_of_files(paths: list[Path]) -> str:
    """One fingerprint over several files: names and bytes."""
    return fingerprint_of([(path.name, fingerprint_of_file(path)) for path in sorted(paths)])


def write_json_atomically(path: Path, value: object, *, durable: bool = True) -> None:
    """Writes JSON so that a reader sees the old file or the new one, never a part; `durable`: after a power cut too."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
        if durable:
            # Else a power loss could leave the new name with nothing in it.
            file.flush()
            os.fsync(file.fileno())
    os.replace(temporary, path)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes the manifest; do it last, a folder without one is unfinished."""
    write_json_atomically(folder / MANIFEST, asdict(manifest))


def read_manifest(folder: Path, kind: Kind, *, remedy: str) -> Manifest:
    """The manifest of the artefact in `folder`.

    Raises:
        DataError | CheckpointError: no artefact there, another kind, or a format this version cannot read.
    """
    error = CheckpointError if kind == "checkpoint" else DataError
    path = Path(folder) / MANIFEST
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        manifest = Manifest(**raw)
    except FileNotFoundError:
        raise error(f"no finished {kind} here", where=str(folder), remedy=remedy) from None
    except (OSError, ValueError, TypeError) as cause:
        raise error(f"unreadable manifest ({cause})", where=str(path), remedy=remedy) from None
    if manifest.kind != kind:
        raise error("wrong kind of artefact", where=str(path), expected=kind, got=manifest.kind, remedy=remedy)
    if manifest.format_version != FORMAT_VERSION:
        raise error(
            "unknown format version",
            where=str(path),
            expected=FORMAT_VERSION,
            got=manifest.format_version,
            remedy=remedy,
        )
    return manifest


def require_input(manifest: Manifest, name: str, fingerprint: str, *, where: Path, other: str, remedy: str) -> None:
    """Refuses an artefact that was made from another input than the one in use.

    Args:
        other: the path or name of the input in use, for the message.
    """
    recorded = manifest.inputs.get(name)
    if recorded != fingerprint:
        raise DataError(
            f"this {manifest.kind} was made from another {name}",
            where=str(where),
            expected=f"{name} {fingerprint} ({other})",
            got=f"{name} {recorded}",
            remedy=remedy,
        )


@contextmanager
def atomic_folder(target: Path, *, overwrite: bool = True) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its name on success and vanishes on failure.

    A killed writer leaves a hidden `.NAME.*.tmp` folder, never one that looks finished.
    """
    target = Path(target).absolute()
    if target.exists() and not overwrite:
        raise DataError("already exists", where=str(target), remedy="pass --overwrite or choose another folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    temporary.chmod(0o755)
    try:
        yield temporary
        if target.exists():
            shutil.rmtree(target)
        os.replace(temporary, target)
    finally:
        if temporary.exists():
            shutil.rmtree(temporary)
