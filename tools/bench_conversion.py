"""Measures the converters on a random model: throughput against copying the same bytes, and peak memory.

    python -m tools.bench_conversion --folder DIR [--gigabytes 3] [--keep]

writes a random bf16 model into DIR (on the disk to be measured), copies its files, converts it to Megatron and back in
a process each, and compares the result bit for bit by its fingerprint. Each run starts with the source dropped from the
page cache and ends when the bytes are on disk. Medians over the rounds; a share is that of the runs of one round.
Limits: 60 % of the copy's throughput; peak memory of the largest group of tensors plus 1 GiB.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from checkpoints_conversion import plan
from checkpoints_conversion.hf_writer import SafetensorsWriter, TensorSpec
from checkpoints_conversion.planning import layout_of
from megatron_offgrpo.artifacts import read_manifest
from megatron_offgrpo.errors import OffgrpoError
from megatron_offgrpo.progress import progress, say

MIN_SHARE, EXTRA_BYTES = 0.6, 2**30
CHILD = """
import json, shutil, sys, time
from pathlib import Path
from checkpoints_conversion import hf_to_megatron, megatron_to_hf
folder = Path(sys.argv[2])
# Imports take seconds, whatever the model's size.
import transformers
transformers.CONFIG_MAPPING["qwen2"]
shutil.rmtree(folder / {"hf_to_megatron": "megatron", "megatron_to_hf": "back"}[sys.argv[1]], ignore_errors=True)
start, cpu = time.perf_counter(), time.process_time()
if sys.argv[1] == "hf_to_megatron":
    hf_to_megatron(folder / "hf", folder / "megatron")
else:
    megatron_to_hf(folder / "megatron", folder / "hf", folder / "back")
seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
# getrusage would count what the parent had in memory when it made this process.
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps([seconds, cpu, int(peak.split()[1]) * 1024]))
"""


def write_random_model(folder: Path, gigabytes: float) -> None:
    """A Qwen2 model of about this size; layers as in a 1.5B model, the number of layers makes the size."""
    layer = 2 * (1536 * 1536 * 2 + 2 * 256 * 1536 + 3 * 1536 * 8960)
    embeddings = 2 * 2 * 151936 * 1536
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "max_position_embeddings": 4096,
        "num_attention_heads": 12,
        "num_hidden_layers": max(1, round((gigabytes * 1e9 - embeddings) / layer)),
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": 151936,
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    specs = [TensorSpec(name, torch.bfloat16, shape) for name, shape in layout_of(folder).hf_shapes().items()]
    writer = SafetensorsWriter(folder, specs, 10**9)
    generator = torch.Generator().manual_seed(0)
    with progress("writing a random model (MB)", sum(spec.num_bytes for spec in specs) / 1e6) as advance:
        for spec in specs:
            bits = torch.randint(-(2**15), 2**15, spec.shape, generator=generator, dtype=torch.int16)
            writer.write(spec.name, bits.view(torch.bfloat16))
            advance(spec.num_bytes / 1e6)
    writer.close()


def forget(folder: Path) -> None:
    """Drops the files of a folder from the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@dataclass(frozen=True)
class Run:
    """One copy or conversion."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int


def copy(source: Path, target: Path) -> Run:
    """Copies all files of a folder and waits until they are on disk."""
    shutil.rmtree(target, ignore_errors=True)
    start, cpu = time.perf_counter(), time.process_time()
    target.mkdir()
    for path in sorted(source.iterdir()):
        shutil.copyfile(path, target / path.name)
        with (target / path.name).open("rb") as file:
            os.fsync(file.fileno())
    return Run(time.perf_counter() - start, time.process_time() - cpu, 0)


def convert(direction: str, folder: Path) -> Run:
    """One conversion in a process of its own."""
    command = [sys.executable, "-W", "ignore", "-c", CHILD, direction, str(folder)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return Run(*json.loads(output))


def measure(work: Path, repeats: int) -> dict[str, list[Run]]:
    """Copy, there and back in turn, so that what else the machine does meets all of them."""
    runs: dict[str, list[Run]] = {"copy": [], "hf_to_megatron": [], "megatron_to_hf": []}
    for _ in range(repeats):
        for name, source in (("copy", "hf"), ("hf_to_megatron", "hf"), ("megatron_to_hf", "megatron")):
            forget(work / source)
            runs[name].append(copy(work / "hf", work / "copy") if name == "copy" else convert(name, work))
    return runs


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="folder on the disk to be measured")
    parser.add_argument("--gigabytes", type=float, default=3.0)
    parser.add_argument("--repeats", type=int, default=5, help="medians over this many rounds")
    parser.add_argument("--keep", action="store_true", help="leave the models in the folder")
    options = parser.parse_args()
    work = options.folder / "bench_conversion"
    shutil.rmtree(work, ignore_errors=True)
    write_random_model(work / "hf", options.gigabytes)
    ready = plan(work / "hf")
    say(ready.describe())
    num_bytes = ready.total_bytes
    largest = max(sum(ready.source.tensors[name].num_bytes for name in move.names) for move in ready.layout.moves)
    runs = measure(work, options.repeats)
    seconds = {name: median(run.seconds for run in done) for name, done in runs.items()}
    ok = True
    for name, done in runs.items():
        cpu, peak = median(run.cpu_seconds for run in done), max(run.peak_bytes for run in done)
        line = f"{name:15} {num_bytes / seconds[name] / 1e6:6.0f} MB/s {seconds[name]:6.1f} s {cpu:6.1f} s of CPU"
        if name != "copy":
            share = median(copied.seconds / run.seconds for copied, run in zip(runs["copy"], done, strict=True))
            ok &= share >= MIN_SHARE and peak <= largest + EXTRA_BYTES
            line += f"  {share:4.0%} of copying (at least {MIN_SHARE:.0%})"
            line += f"  peak {peak / 1e6:,.0f} MB (at most {(largest + EXTRA_BYTES) / 1e6:,.0f})"
        print(line)
    there = read_manifest(work / "megatron" / "release", "checkpoint", remedy="")
    back = read_manifest(work / "back", "checkpoint", remedy="")
    same = there.fingerprint == back.fingerprint
    print(f"round trip: {'bit-identical' if same else 'DIFFERENT'}")
    if not options.keep:
        shutil.rmtree(work)
    return 0 if ok and same else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except OffgrpoError as error:
        sys.exit(f"error: {error}")
