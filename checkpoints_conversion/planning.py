"""What moves where, settled and checked before a byte moves."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from checkpoints_conversion.config_fields import check_fields
from checkpoints_conversion.families import dims_of, family_of
from checkpoints_conversion.hf_reader import DTYPES, HfWeights
from checkpoints_conversion.ops import Dims, Op, Shape, VocabRows
from checkpoints_conversion.tables.rows import Family, Row
from checkpoints_conversion.unsupported import REASONS
from megatron_offgrpo.errors import CheckpointError, ConfigError
from megatron_offgrpo.model.hf_config import Architecture, read_architecture

_PART = re.compile(r"\[(\d+)/(\d+)\]$")


@dataclass(frozen=True)
class Region:
    """A block of a Megatron tensor: one layer (and expert) of it, and part `part` of `num_parts` of its rows.

    The stored tensor has a leading dimension per index; `shape` is that of the block without them.
    """

    pattern: str
    indices: tuple[tuple[str, int, int], ...]
    """(placeholder, index, number) for each leading dimension: layer, then expert."""
    part: int
    num_parts: int
    shape: Shape

    @property
    def key(self) -> str:
        """Name of the stored tensor."""
        return re.sub(r"\.\{\w+\}", "", self.pattern)

    @property
    def global_shape(self) -> Shape:
        rows = (self.shape[0] * self.num_parts, *self.shape[1:])
        return (*(number for _, _, number in self.indices), *rows)

    @property
    def offsets(self) -> Shape:
        block = (self.shape[0] * self.part, *(0 for _ in self.shape[1:]))
        return (*(index for _, index, _ in self.indices), *block)

    @property
    def sizes(self) -> Shape:
        return (*(1 for _ in self.indices), *self.shape)


@dataclass(frozen=True)
class Move:
    """One region and the Hugging Face tensors that it is made of."""

    region: Region
    names: tuple[str, ...]
    shapes: tuple[Shape, ...]
    op: Op

    @property
    def padded(self) -> bool:
        """Whether Megatron may hold more rows than the model has."""
        return isinstance(self.op, VocabRows)


@dataclass(frozen=True)
class Layout:
    """All moves of a model, from its config alone."""

    family: Family
    architecture: Architecture
    dims: Dims
    moves: tuple[Move, ...]

    def hf_shapes(self) -> dict[str, Shape]:
        """Name of every Hugging Face tensor -> its shape, in the order of the moves."""
        return {name: shape for move in self.moves for name, shape in zip(move.names, move.shapes, strict=True)}


@dataclass(frozen=True)
class ConversionPlan:
    """A layout together with the weights of a folder that fit it exactly."""

    layout: Layout
    source: HfWeights
    ignored: tuple[str, ...]
    """Tensors of the source that no model reads."""
    tied_copies: tuple[tuple[str, str], ...]
    """(copy, original): stored copies of the embedding, which must equal it."""

    @property
    def total_bytes(self) -> int:
        return sum(self.source.tensors[name].num_bytes for name in self.layout.hf_shapes())

    @property
    def num_parameters(self) -> int:
        return sum(torch.Size(shape).numel() for shape in self.layout.hf_shapes().values())

    def describe(self) -> str:
        """A few lines for a person."""
        dims, shapes = self.layout.dims, self.layout.hf_shapes()
        tied = self.layout.architecture.tied_embeddings
        dtypes = sorted({str(self.source.tensors[name].dtype).removeprefix("torch.") for name in shapes})
        largest = max(sum(self.source.tensors[name].num_bytes for name in move.names) for move in self.layout.moves)
        keys = {move.region.key for move in self.layout.moves}
        return "\n".join(
            [
                f"family {self.layout.family.name}, {self.num_parameters:,} parameters, {dims.layers} layers, "
                f"vocabulary {dims.vocab}, embeddings {'tied' if tied else 'not tied'}",
                f"{len(shapes)} Hugging Face tensors ({', '.join(dtypes)}, {self.total_bytes / 1e6:,.1f} MB) "
                f"<-> {len(keys)} Megatron tensors in {len(self.layout.moves)} pieces",
                f"largest group in memory at once: {largest / 1e6:,.1f} MB",
                *(f"ignored (no model reads it): {name}" for name in self.ignored),
            ]
        )


def layout_of(hf_dir: Path) -> Layout:
    """The moves of the model whose config.json lies in `hf_dir`.

    Raises:
        ConfigError: no configuration, or one that Megatron cannot express.
    """
    raw = _read_config(hf_dir)
    where = str(hf_dir / "config.json")
    if raw.get("model_type") in REASONS:
        raise ConfigError(
            "Megatron-Core cannot express this model family",
            where=f"{where}: model_type",
            got=f"{raw['model_type']}: {REASONS[raw['model_type']]}",
        )
    family = family_of(raw, where)
    check_fields(raw, where)
    architecture = read_architecture(hf_dir)
    dims = dims_of(architecture)
    # Layer by layer, as the files of a model are ordered; rows without a layer come first.
    rows = family.rows(architecture)
    outer = [row for row in rows if "{layer}" not in row[0]]
    inner = [row for row in rows if "{layer}" in row[0]]
    moves = [move for row in outer for move in _moves(row, dims, None)]
    moves += [move for layer in range(dims.layers) for row in inner for move in _moves(row, dims, layer)]
    return Layout(family, architecture, dims, tuple(moves))


def _read_config(hf_dir: Path) -> dict[str, Any]:
    path = hf_dir / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(raw, dict):
            raise ValueError("not a JSON object")
    except (OSError, ValueError) as cause:
        raise ConfigError(
            f"cannot read the model's configuration ({cause})",
            where=str(path),
            expected="a Hugging Face model folder",
            remedy="pass the folder that holds config.json and the safetensors files",
        ) from None
    return raw


def _moves(row: Row, dims: Dims, layer: int | None) -> Iterator[Move]:
    pattern, op = row
    match = _PART.search(pattern)
    part, num_parts = (int(match[1]), int(match[2])) if match else (0, 1)
    pattern = _PART.sub("", pattern)
    indices = () if layer is None else (("layer", layer, dims.layers),)
    for expert in range(dims.experts) if "{expert}" in pattern else (None,):
        all_indices = indices if expert is None else (*indices, ("expert", expert, dims.experts))
        values = {name: index for name, index, _ in all_indices}
        region = Region(pattern, all_indices, part, num_parts, op.megatron_shape(dims))
        yield Move(region, tuple(name.format(**values) for name in op.names), op.hf_shapes(dims), op)


def plan(hf_dir: Path, *, one_dtype: bool = False) -> ConversionPlan:
    """Checks a Hugging Face folder against its family's table: every tensor used once, every target made once.

    Args:
        one_dtype: all weights are going to have one dtype, so that those of a Megatron tensor may come in several.

    Raises:
        CheckpointError: one error that lists all missing, unexpected, duplicated and wrongly shaped tensors, and those
            of a dtype that is not converted.
    """
    layout = layout_of(Path(hf_dir))
    source = HfWeights(Path(hf_dir))
    _check_targets(layout)
    expected = layout.hf_shapes()
    ignorable = {name.format(layer=layer) for name in layout.family.ignored for layer in range(layout.dims.layers)}
    tied = {"lm_head.weight": "model.embed_tokens.weight"} if layout.architecture.tied_embeddings else {}
    others = {name: dtype for name, dtype in source.other_dtypes.items() if name in expected or name in tied}
    extra = [name for name in (*source.tensors, *source.other_dtypes) if name not in expected]
    mixed = [] if one_dtype else _mixed_dtypes(layout, source)
    misfits = list(source.problems)
    for name, shape in expected.items():
        if name not in source.tensors and name not in others:
            misfits.append(f"missing {name}, shape {list(shape)}")
        elif name in source.tensors and source.tensors[name].shape != shape:
            misfits.append(f"wrong shape of {name}: expected {list(shape)}, got {list(source.tensors[name].shape)}")
    misfits += [f"unexpected {name}" for name in extra if name not in ignorable and name not in tied]
    problems = [*misfits, *(_unsupported(name, dtype) for name, dtype in others.items()), *mixed]
    if problems:
        remedies = {
            "check that config.json belongs to these weights": misfits,
            "save the model in bf16, fp16 or fp32, or take such a release of it": others,
            "--dtype bf16 (or fp16, fp32) converts all weights to one dtype": mixed,
        }
        raise CheckpointError(
            f"{len(problems)} tensors do not fit a {layout.family.name} model:\n  "
            + "\n  ".join(sorted(problems))
            + "\n",
            where=str(hf_dir),
            remedy="; ".join([*(text for text, found in remedies.items() if found), "nothing has been written"]),
        )
    copies = tuple((name, tied[name]) for name in extra if name in tied)
    return ConversionPlan(layout, source, tuple(name for name in extra if name in ignorable), copies)


def _unsupported(name: str, dtype: str) -> str:
    kind = "fp8 weights are not converted" if dtype.startswith("F8_") else "this dtype is not converted"
    return f"dtype of {name} is {dtype}: {kind}, expected one of {', '.join(DTYPES)}"


def _mixed_dtypes(layout: Layout, source: HfWeights) -> list[str]:
    """A Megatron tensor has one dtype: names the keys whose sources have several."""
    dtypes: dict[str, dict[torch.dtype, str]] = {}
    for move in layout.moves:
        for name in move.names:
            if name in source.tensors:
                dtypes.setdefault(move.region.key, {}).setdefault(source.tensors[name].dtype, name)
    return [
        f"mixed dtypes for {key}: " + ", ".join(f"{name} is {dtype}" for dtype, name in kinds.items())
        for key, kinds in dtypes.items()
        if len(kinds) > 1
    ]


def _check_targets(layout: Layout) -> None:
    """Asserts that the table fills every Megatron tensor exactly once and names every source once."""
    filled: dict[str, int] = {}
    shapes: dict[str, Shape] = {}
    seen: set[tuple[str, Shape]] = set()
    for move in layout.moves:
        region = move.region
        assert (region.key, region.offsets) not in seen, f"made twice: {region.key} at {region.offsets}"
        seen.add((region.key, region.offsets))
        assert shapes.setdefault(region.key, region.global_shape) == region.global_shape, region.key
        filled[region.key] = filled.get(region.key, 0) + torch.Size(region.sizes).numel()
    for key, numel in filled.items():
        assert numel == torch.Size(shapes[key]).numel(), f"{key} is not filled"
    names = [name for move in layout.moves for name in move.names]
    assert len(names) == len(set(names)), "a source tensor is used twice"
