"""Converts a model between Hugging Face and Megatron, one group of tensors at a time."""

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from checkpoints_conversion.files import bytes_of
from checkpoints_conversion.fingerprints import WeightsFingerprint
from checkpoints_conversion.hf_reader import HfWeights
from checkpoints_conversion.hf_writer import SafetensorsWriter, TensorSpec, carry_files, parse_size
from checkpoints_conversion.megatron_lm_args import args_of
from checkpoints_conversion.megatron_reader import MegatronWeights, iteration_folder
from checkpoints_conversion.megatron_writer import RELEASE, TRACKER, TorchDistWriter, extra_state_keys
from checkpoints_conversion.ops import Same
from checkpoints_conversion.planning import ConversionPlan, Layout, Move, layout_of, plan
from checkpoints_conversion.recorded import require_recorded
from checkpoints_conversion.streaming import Job, memory_of, row_blocks, run_all
from megatron_offgrpo.artifacts import Manifest, atomic_folder, write_manifest
from megatron_offgrpo.errors import CheckpointError, ConfigError
from megatron_offgrpo.model.hf_config import ARCHITECTURE
from megatron_offgrpo.progress import progress, say

HF_TO_MEGATRON = "hf-to-megatron"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# What Megatron-LM looks at in common.pt of a checkpoint without optimizer; version 3.0: today's order of the QKV rows.
RELEASE_COMMON = {
    "checkpoint_version": 3.0,
    "iteration": 0,
    "content_metadata": {"singleton_local_shards": False, "distrib_optim_sharding_type": "fully_reshardable"},
}


def parse_dtype(name: str | None) -> torch.dtype | None:
    """`"bf16"` -> torch.bfloat16; None stays None."""
    if name is None:
        return None
    if name not in DTYPES:
        raise ConfigError("unknown dtype", where="--dtype", expected=" or ".join(DTYPES), got=name)
    return DTYPES[name]


def hf_to_megatron(hf_dir: Path, megatron_dir: Path, *, dtype: str | None = None, overwrite: bool = False) -> Manifest:
    """Writes the weights of a Hugging Face folder as a torch_dist checkpoint that any parallel layout loads.

    Args:
        dtype: bf16, fp16 or fp32; by default each tensor keeps its own.

    Raises:
        CheckpointError | ConfigError: see `plan`; or the target exists.
    """
    target_dtype = parse_dtype(dtype)
    ready = plan(Path(hf_dir), one_dtype=target_dtype is not None)
    _check_copies(ready, target_dtype)
    megatron_dir = Path(megatron_dir)
    tracker = megatron_dir / TRACKER
    if tracker.exists() and tracker.read_text(encoding="utf-8").strip() != RELEASE:
        raise CheckpointError(
            "this folder holds a trained checkpoint", where=str(megatron_dir), remedy="choose another folder"
        )
    fingerprint, source_fingerprint = WeightsFingerprint(), WeightsFingerprint()
    with (
        _only_writer(megatron_dir / RELEASE, overwrite) as folder,
        progress("Hugging Face -> Megatron (MB)", ready.total_bytes / 1e6) as advance,
    ):
        dtypes = {m: target_dtype or ready.source.tensors[m.names[0]].dtype for m in ready.layout.moves}
        pieces = [(move.region, dtypes[move]) for move in ready.layout.moves]
        writer = TorchDistWriter(folder, pieces, extra_state_keys(ready.layout))

        def convert(move: Move) -> None:
            memory = None
            for first, count in row_blocks(move, 4):
                tensors = _load_block(ready.source, move, first, count, memory)
                memory = tensors[0]
                for i, (name, shape) in enumerate(zip(move.names, move.shapes, strict=True)):
                    if target_dtype is not None:
                        source_fingerprint.add(name, tensors[i], shape)
                        tensors[i] = tensors[i].to(target_dtype)
                    fingerprint.add(name, tensors[i], shape)
                    advance(tensors[i].numel() * ready.source.tensors[name].dtype.itemsize / 1e6)
                writer.write(move.region, move.op.to_megatron(tensors, ready.layout.dims), first)

        run_all(Job(memory_of(move, 4), partial(convert, move)) for move in ready.layout.moves)
        writer.close({**RELEASE_COMMON, "args": args_of(ready.layout.architecture, dtypes[ready.layout.moves[0]])})
        source = source_fingerprint.result() if target_dtype is not None else fingerprint.result()
        manifest = Manifest(
            kind="checkpoint",
            fingerprint=fingerprint.result(),
            inputs={"hf": source, **_tokenizer_input(Path(hf_dir))},
            counts={
                **_counts(ready.layout),
                ARCHITECTURE: asdict(ready.layout.architecture),
                "file_bytes": file_sizes(folder),
            },
            config={"direction": HF_TO_MEGATRON, "family": ready.layout.family.name, "dtype": dtype},
        )
        write_manifest(folder, manifest)
    temporary = tracker.with_name(f".{TRACKER}.tmp")
    temporary.write_text(RELEASE, encoding="utf-8")
    temporary.replace(tracker)
    return manifest


def megatron_to_hf(
    megatron_dir: Path,
    hf_template_dir: Path,
    output_dir: Path,
    *,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    iteration: int | None = None,
    overwrite: bool = False,
) -> Manifest:
    """Writes a Megatron checkpoint as a Hugging Face folder.

    Args:
        hf_template_dir: the model that training began with: config, generation config, tokenizer and chat template are
            taken from it. Its weights are not read.
        dtype: bf16, fp16 or fp32; fp32 takes the optimizer's master weights where the checkpoint has them. By default
            each tensor keeps the dtype it has.
        iteration: which one of a trained checkpoint; by default the latest.

    Raises:
        CheckpointError | ConfigError: the checkpoint does not fit the model, is truncated, or the target exists.
    """
    target_dtype = parse_dtype(dtype)
    layout = layout_of(Path(hf_template_dir))
    weights = MegatronWeights(iteration_folder(Path(megatron_dir), iteration))
    prefixes = check_checkpoint(layout, weights, masters=dtype == "fp32")
    require_recorded(layout.architecture, weights, str(hf_template_dir))
    masters = any(prefixes.values())
    if dtype == "fp32" and not masters:
        say("this checkpoint holds no fp32 master weights: the model's own weights are exported as fp32")
    dtypes = {move: target_dtype or weights.dtype(move.region) for move in layout.moves}
    specs = [TensorSpec(n, dtypes[m], s) for m in layout.moves for n, s in zip(m.names, m.shapes, strict=True)]
    fingerprint = WeightsFingerprint()
    with (
        _only_writer(Path(output_dir), overwrite) as folder,
        progress("Megatron -> Hugging Face (MB)", sum(spec.num_bytes for spec in specs) / 1e6) as advance,
    ):
        carry_files(Path(hf_template_dir), folder, target_dtype)
        writer = SafetensorsWriter(folder, specs, parse_size(max_shard_size))

        def convert(move: Move) -> None:
            memory = None
            for first, count in row_blocks(move, 4):
                # Fresh memory for each block would cost as much as reading it.
                memory = weights.read(move.region, prefixes[move], first, count, memory)
                rows = memory.to(dtypes[move])
                parts = move.op.to_hf(rows, layout.dims)
                for name, shape, part in zip(move.names, move.shapes, parts, strict=True):
                    part = part.contiguous()
                    fingerprint.add(name, part, shape)
                    writer.write(name, part, first)
                    advance(part.nbytes / 1e6)

        run_all(Job(memory_of(move, 4), partial(convert, move)) for move in layout.moves)
        writer.close()
        if dtype is None:
            _check_unchanged(weights, fingerprint.result())
        manifest = Manifest(
            kind="checkpoint",
            fingerprint=fingerprint.result(),
            inputs={"megatron": weights.fingerprint},
            counts=_counts(layout),
            config={
                "direction": "megatron-to-hf",
                "family": layout.family.name,
                "dtype": dtype,
                "master_weights": masters,
                "iteration": weights.folder.name,
            },
        )
        write_manifest(folder, manifest)
    return manifest


def check_checkpoint(layout: Layout, weights: MegatronWeights, *, masters: bool) -> dict[Move, str]:
    """Which stored copy of each region to read: the prefix of the master weights, or "" for the model's own.

    Raises:
        CheckpointError: one error with all missing, unexpected and wrongly shaped tensors.
    """
    problems, prefixes, used = [], {}, set()
    for move in layout.moves:
        candidates = [*(weights.master_prefixes if masters else ()), ""]
        prefix = next((p for p in candidates if weights.find(move.region, p)), "")
        problem = weights.problem(move.region, padded=move.padded, prefix=prefix)
        if problem is not None:
            problems.append(problem)
        prefixes[move] = prefix
        found = weights.find(move.region)
        used |= {found.key} if found else set()
    # State of the optimizer and of the data loader stand beside the model under other names.
    model_keys = [key for key in weights.tensors if key.startswith(("embedding.", "decoder.", "output_layer."))]
    problems += [f"unexpected {key}" for key in model_keys if key not in used]
    if problems:
        problems = sorted(set(problems))
        raise CheckpointError(
            f"{len(problems)} tensors do not fit a {layout.family.name} model:\n  " + "\n  ".join(problems) + "\n",
            where=str(weights.folder),
            remedy="pass the Hugging Face folder that this checkpoint was made from; nothing has been written",
        )
    return prefixes


def _check_copies(ready: ConversionPlan, dtype: torch.dtype | None) -> None:
    for copy, original in ready.tied_copies:
        a, b = (ready.source.load(name) for name in (copy, original))
        if dtype is not None:
            a, b = a.to(dtype), b.to(dtype)
        if a.dtype != b.dtype or bytes_of(a) != bytes_of(b):
            raise CheckpointError(
                f"config.json ties the embeddings, but {copy} differs from {original}",
                where=str(ready.source.folder),
                remedy="set tie_word_embeddings to false in config.json if the model has an output layer of its own",
            )


def _tokenizer_input(hf_dir: Path) -> dict[str, str]:
    """The fingerprint by which a store of tokens is compared with this model; a model may come without a tokenizer."""
    if not any((hf_dir / name).is_file() for name in TOKENIZER_FILES):
        return {}
    from megatron_offgrpo.data.store import tokenizer_fingerprint

    return {"tokenizer": tokenizer_fingerprint(hf_dir)}


def _check_unchanged(weights: MegatronWeights, fingerprint: str) -> None:
    """A converted checkpoint gives back what went in; anything else is damage on the disk."""
    written = weights.manifest
    if written is not None and written.config.get("direction") == HF_TO_MEGATRON and written.fingerprint != fingerprint:
        raise CheckpointError(
            "the weights are not those that were written here",
            where=str(weights.folder),
            expected=f"fingerprint {written.fingerprint}",
            got=fingerprint,
            remedy="the files were damaged or changed: convert the Hugging Face model again",
        )


def _load_block(source: HfWeights, move: Move, first: int, count: int, memory: Tensor | None) -> list[Tensor]:
    """The source tensors of a move's block of rows, in the block before's memory; whole ones if rows change order."""
    if isinstance(move.op, Same):
        return [source.load(move.names[0], first, count, memory)]
    return [source.load(name) for name in move.names]


def file_sizes(folder: Path) -> dict[str, int]:
    """Name -> bytes of every file, by which a reader notices a truncated checkpoint."""
    return {path.name: path.stat().st_size for path in sorted(folder.iterdir())}


def _counts(layout: Layout) -> dict[str, int]:
    shapes = layout.hf_shapes()
    return {"tensors": len(shapes), "parameters": sum(torch.Size(shape).numel() for shape in shapes.values())}


@contextmanager
def _only_writer(target: Path, overwrite: bool) -> Iterator[Path]:
    """`atomic_folder` under a lock, so that what a killed conversion left behind can be removed safely."""
    target = target.absolute()
    if target.exists() and not overwrite:
        raise CheckpointError("already exists", where=str(target), remedy="pass --overwrite or choose another folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = target.with_name(f".{target.name}.lock")
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise CheckpointError("another conversion is writing this folder", where=str(target)) from None
        try:
            for left_behind in target.parent.glob(f".{target.name}.*.tmp"):
                shutil.rmtree(left_behind)
            with atomic_folder(target, overwrite=overwrite) as folder:
                yield folder
        except OSError as cause:
            raise CheckpointError(f"cannot write ({cause})", where=str(target)) from None
        finally:
            lock.unlink()
