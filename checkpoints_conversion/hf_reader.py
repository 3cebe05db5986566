"""Reads the safetensors of a Hugging Face folder, a tensor or some of its rows at a time."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from checkpoints_conversion.files import FilePool, bytes_of
from megatron_offgrpo.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
SHARDS = "model-*-of-*.safetensors"
# Bits of a value of the format's other dtypes; a file with a newer one is not damaged.
OTHER_BITS = {"F64": 64, "I64": 64, "U64": 64, "C64": 64, "I32": 32, "U32": 32, "I16": 16, "U16": 16, "I8": 8, "U8": 8}
OTHER_BITS |= {"BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: bytes `start` to `start + num_bytes` of `file`."""

    file: Path
    start: int
    num_bytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class HfWeights:
    """The tensors of a model folder, by name; `problems` lists what is wrong with the files themselves.

    `other_dtypes` names the tensors of a dtype that is not converted, with that dtype; they cannot be loaded.

    Raises:
        CheckpointError: no safetensors here (pickled weights are refused), those of two models, or an unreadable or
            truncated file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.tensors: dict[str, StoredTensor] = {}
        self.other_dtypes: dict[str, str] = {}
        self.problems: list[str] = []
        self._file_of: dict[str, str] = {}
        self._files = FilePool()
        weight_map = self._weight_map()
        files = sorted(set(weight_map.values())) if weight_map is not None else [SINGLE]
        for name in files:
            for tensor_name, stored in _header(self.folder / name).items():
                self._add(tensor_name, stored, name, weight_map)
        for tensor_name in sorted(set(weight_map or ()) - set(self.tensors) - set(self.other_dtypes)):
            assert weight_map is not None
            self.problems.append(f"missing {tensor_name}: {INDEX} says it is in {weight_map[tensor_name]}, it is not")

    def _weight_map(self) -> dict[str, str] | None:
        """The index's map of tensor name to file; None for a single file."""
        index, single = self.folder / INDEX, (self.folder / SINGLE).exists()
        if not index.exists():
            if not single:
                raise _no_weights(self.folder)
            shards = sorted(path.name for path in self.folder.glob(SHARDS))
            if shards:
                raise _two_models(self.folder, shards[0])
            return None
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            weight_map = {str(name): str(file) for name, file in weight_map.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as cause:
            raise CheckpointError(f"unreadable index ({cause!r})", where=str(index), expected="weight_map") from None
        if single and set(weight_map.values()) != {SINGLE}:
            raise _two_models(self.folder, INDEX)
        return weight_map

    def _add(self, name: str, stored: StoredTensor | str, file: str, weight_map: dict[str, str] | None) -> None:
        if name in self._file_of:
            self.problems.append(f"duplicated {name}: in {self._file_of[name]} and in {file}")
        elif weight_map is not None and name not in weight_map:
            self.problems.append(f"unexpected {name}: in {file}, not in {INDEX}")
        else:
            self._file_of[name] = file
            if isinstance(stored, str):
                self.other_dtypes[name] = stored
            else:
                self.tensors[name] = stored

    def load(self, name: str, first_row: int = 0, num_rows: int | None = None, out: Tensor | None = None) -> Tensor:
        """The tensor as stored, or some of its rows; in the memory of `out` where that is given."""
        stored = self.tensors[name]
        shape = stored.shape if num_rows is None else (num_rows, *stored.shape[1:])
        tensor = torch.empty(shape, dtype=stored.dtype) if out is None else out[: shape[0]]
        row_bytes = torch.Size(stored.shape[1:]).numel() * stored.dtype.itemsize
        self._files.read(stored.file, stored.start + first_row * row_bytes, bytes_of(tensor))
        return tensor


def _two_models(folder: Path, other: str) -> CheckpointError:
    return CheckpointError(
        "two models lie in this folder, and readers differ in which they take",
        where=str(folder),
        expected=f"{SINGLE}, or {INDEX} with its shards",
        got=f"{SINGLE} and {other}",
        remedy="move away the files of the one that is not wanted, or download the model again into an empty folder",
    )


def _no_weights(folder: Path) -> CheckpointError:
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickled:
        return CheckpointError(
            "pickled weights are not read: a pickle can run any code",
            where=str(folder / pickled[0]),
            expected=f"{SINGLE} or {INDEX}",
            remedy="save the model with safetensors, in a place where you trust the file: "
            "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)",
        )
    return CheckpointError("no weights here", where=str(folder), expected=f"{SINGLE} or {INDEX}")


def _header(path: Path) -> dict[str, StoredTensor | str]:
    """The tensors that a safetensors file declares, checked against the file's length; the dtype alone of others."""
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise ValueError(f"the file has {size} bytes, its header says {length + 8}")
            entries = json.loads(file.read(length))
        return {
            name: _entry(path, name, entry, 8 + length, size)
            for name, entry in entries.items()
            if name != "__metadata__"
        }
    except FileNotFoundError:
        raise CheckpointError("missing weights file", where=str(path), remedy="download the model again") from None
    except OSError as cause:
        raise CheckpointError(
            f"the weights file cannot be read ({cause.strerror})", where=str(path), remedy="look at its permissions"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as cause:
        raise CheckpointError(
            f"truncated or unreadable safetensors file ({cause})", where=str(path), remedy="download the model again"
        ) from None


def _entry(path: Path, name: str, entry: dict, data_start: int, size: int) -> StoredTensor | str:
    dtype, shape = str(entry["dtype"]), tuple(entry["shape"])
    start, end = entry["data_offsets"]
    bits = DTYPES[dtype].itemsize * 8 if dtype in DTYPES else OTHER_BITS.get(dtype)
    if bits is not None and (end - start) * 8 != torch.Size(shape).numel() * bits:
        raise ValueError(f"{name} takes {end - start} bytes, its shape {list(shape)} needs another number")
    if data_start + end > size:
        raise ValueError(f"{name} ends at byte {data_start + end}, the file at {size}")
    if dtype not in DTYPES:
        return dtype
    return StoredTensor(path, data_start + start, end - start, DTYPES[dtype], shape)
