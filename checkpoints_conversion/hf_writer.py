"""Writes the safetensors of a Hugging Face folder one tensor at a time, and carries the other files along."""

import json
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from checkpoints_conversion.files import FilePool, bytes_of
from checkpoints_conversion.hf_reader import DTYPE_NAMES, INDEX, SINGLE
from megatron_offgrpo.errors import ConfigError

CARRIED = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template*",
    "LICENSE*",
    "USE_POLICY*",
)
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def parse_size(text: str) -> int:
    """`"5GB"` -> 5000000000 bytes."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if match is None or match[2].upper() not in _UNITS or float(match[1]) <= 0:
        raise ConfigError("unreadable size", where="--max-shard-size", expected="a size such as 5GB", got=text)
    return int(float(match[1]) * _UNITS[match[2].upper()])


class SafetensorsWriter:
    """Files of at most `max_shard_bytes` (a larger tensor has one to itself), laid out before they are filled."""

    def __init__(self, folder: Path, specs: Iterable[TensorSpec], max_shard_bytes: int) -> None:
        self.folder = folder
        shards = _split(list(specs), max_shard_bytes)
        self._place: dict[str, tuple[Path, int, TensorSpec]] = {}
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(shards, 1):
            name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            self._lay_out(folder / name, shard)
            weight_map |= {spec.name: name for spec in shard}
        if len(shards) > 1:
            total = sum(spec.num_bytes for shard in shards for spec in shard)
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        self._left = {name: spec.num_bytes for name, (_, _, spec) in self._place.items()}
        self._files = FilePool("r+b")

    def _lay_out(self, path: Path, shard: list[TensorSpec]) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        # Wider dtypes first, as the format's own writer does: every tensor is then aligned to its dtype.
        ordered = sorted(shard, key=lambda spec: -spec.dtype.itemsize)
        offsets = {}
        for spec in ordered:
            end = offset + spec.num_bytes
            header[spec.name] = {
                "dtype": DTYPE_NAMES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [offset, end],
            }
            offsets[spec.name], offset = offset, end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + offset)
        for spec in shard:
            self._place[spec.name] = (path, 8 + len(text) + offsets[spec.name], spec)

    def write(self, name: str, rows: Tensor, first_row: int = 0) -> None:
        """Puts rows `first_row` onwards of a tensor in their place."""
        path, start, spec = self._place[name]
        assert (rows.dtype, tuple(rows.shape[1:])) == (spec.dtype, spec.shape[1:]), (name, rows.dtype, rows.shape)
        row_bytes = torch.Size(spec.shape[1:]).numel() * spec.dtype.itemsize
        self._files.write(path, start + first_row * row_bytes, bytes_of(rows))
        self._left[name] -= rows.nbytes

    def close(self) -> None:
        """Flushes the files to disk; every row must have been written."""
        unfinished = [name for name, left in self._left.items() if left]
        assert not unfinished, f"never written: {unfinished[:3]}"
        self._files.close(sync=True)


def _split(specs: list[TensorSpec], max_bytes: int) -> list[list[TensorSpec]]:
    shards: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in specs:
        if shards[-1] and size + spec.num_bytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += spec.num_bytes
    return shards


def carry_files(template: Path, output: Path, dtype: torch.dtype | None) -> None:
    """Copies config, generation config, tokenizer and chat template; `dtype` is written into the config if given."""
    for pattern in CARRIED:
        for path in sorted(template.glob(pattern)):
            if path.is_file():
                shutil.copyfile(path, output / path.name)
    templates = template / "additional_chat_templates"
    if templates.is_dir():
        shutil.copytree(templates, output / templates.name)
    if dtype is not None:
        path = output / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        key = "dtype" if "dtype" in config else "torch_dtype"
        config[key] = str(dtype).removeprefix("torch.")
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
