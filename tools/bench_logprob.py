"""Time and peak memory of the log-prob head against the naive version, forward and backward.

    python -m tools.bench_logprob [--shape 8192x32000 ...] [--dtype fp32 bf16] [--rounds 5]

naive: the whole fp32 [T, V] log_softmax and its entropy by autograd. Both variants start from the same hidden states
[T, 896] and output weights [V, 896] and end with the gradients of both. Every measurement is a process of its own:
one run for the peak memory beyond the inputs (gradients counted), then one for the time. The variants take turns
(A B A B ...); the table gives medians, of the time ratios those of neighbouring measurements. On a GPU the memory is
the peak of torch's allocator, else the resident set. CPU time is that of all cores.
The exit status is 1 where the head misses its limits at 8192x32000: 1/8 of the memory, 1.4 times the time.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from megatron_offgrpo.progress import progress

if TYPE_CHECKING:
    from torch import Tensor

HIDDEN = 896
SHAPES = ("8192x32000", "1024x151936")
LIMITED_SHAPE = "8192x32000"
MAX_MEMORY_SHARE, MAX_TIME_RATIO = 1 / 8, 1.4
VARIANTS = ("head", "naive")


@dataclass(frozen=True)
class Measurement:
    """One process: peak bytes beyond the inputs, seconds of the run after it, seconds of all cores."""

    extra_bytes: int
    seconds: float
    cpu_seconds: float


def naive(hidden_TH: "Tensor", weight_VH: "Tensor", target_T: "Tensor") -> "tuple[Tensor, Tensor]":
    """Log-probs and entropies [T] from the full fp32 table."""
    log_p_TV = (hidden_TH @ weight_VH.t()).float().log_softmax(-1)
    return log_p_TV.gather(1, target_T[:, None])[:, 0], -(log_p_TV.exp() * log_p_TV).sum(-1)


def head(hidden_TH: "Tensor", weight_VH: "Tensor", target_T: "Tensor", mebibytes: int) -> "tuple[Tensor, Tensor]":
    """The same from the project's head."""
    from megatron_offgrpo.parallel.logprob import chunk_rows_for, vocab_parallel_logprob

    columns = weight_VH.shape[0]
    rows = chunk_rows_for(mebibytes, columns)
    return vocab_parallel_logprob(hidden_TH, weight_VH, target_T, vocab_size=columns, chunk_rows=rows)


def measure(variant: str, shape: str, dtype: str, mebibytes: int) -> Measurement:
    """Runs one variant twice in this process, which must be a fresh one."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows, columns = map(int, shape.split("x"))
    generator = torch.Generator(device).manual_seed(0)
    kind = {"device": device, "dtype": {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype], "generator": generator}
    hidden = torch.randn(rows, HIDDEN, **kind, requires_grad=True)
    # Logits of size 1, as a trained model's are within a small factor.
    weight = torch.randn(columns, HIDDEN, **kind).mul_(HIDDEN**-0.5).requires_grad_()
    target = torch.randint(0, columns, (rows,), device=device, generator=generator)
    coefficient = torch.rand(2, rows, device=device, generator=generator)

    def run() -> None:
        forward = head(hidden, weight, target, mebibytes) if variant == "head" else naive(hidden, weight, target)
        torch.autograd.grad(forward, (hidden, weight), tuple(coefficient))
        if device.type == "cuda":
            torch.cuda.synchronize()

    extra_bytes = _peak_of_cuda(run) if device.type == "cuda" else _peak_of_process(run)
    start, start_cpu = time.perf_counter(), time.process_time()
    run()
    return Measurement(extra_bytes, time.perf_counter() - start, time.process_time() - start_cpu)


def _peak_of_cuda(run: Callable[[], None]) -> int:
    import torch

    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated() - before


def _peak_of_process(run: Callable[[], None]) -> int:
    import resource

    import psutil

    before = psutil.Process().memory_info().rss
    run()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


def in_fresh_process(variant: str, shape: str, dtype: str, mebibytes: int) -> Measurement:
    arguments = [variant, shape, dtype, str(mebibytes)]
    command = [sys.executable, "-W", "ignore", "-m", "tools.bench_logprob", "--measure", *arguments]
    root = Path(__file__).resolve().parents[1]
    return Measurement(**json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, cwd=root).stdout))


def compare(shape: str, dtype: str, mebibytes: int, rounds: int, advance: Callable[[], None]) -> bool:
    """Prints one row of the table; False where the head misses a limit that holds for this shape."""
    taken: dict[str, list[Measurement]] = {variant: [] for variant in VARIANTS}
    for _ in range(rounds):
        for variant in VARIANTS:
            taken[variant].append(in_fresh_process(variant, shape, dtype, mebibytes))
            advance()
    memory = {variant: median(m.extra_bytes for m in taken[variant]) for variant in VARIANTS}
    seconds = {variant: median(m.seconds for m in taken[variant]) for variant in VARIANTS}
    pairs = list(zip(*taken.values(), strict=True))
    share = memory["head"] / memory["naive"]
    # Of neighbours in time, so that what else the machine does weighs on both alike.
    ratio = median(ours.seconds / theirs.seconds for ours, theirs in pairs)
    cpu_ratio = median(ours.cpu_seconds / theirs.cpu_seconds for ours, theirs in pairs)
    print(
        f"{shape:>12} {dtype} {memory['head'] / 2**20:9,.0f} {memory['naive'] / 2**20:9,.0f} {share:7.3f}"
        f" {seconds['head']:9.3f} {seconds['naive']:9.3f} {ratio:6.2f} {cpu_ratio:10.2f}",
        flush=True,
    )
    return shape != LIMITED_SHAPE or (share <= MAX_MEMORY_SHARE and ratio <= MAX_TIME_RATIO)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", default=list(SHAPES), metavar="TxV")
    parser.add_argument("--dtype", nargs="+", default=["fp32", "bf16"], choices=("fp32", "bf16"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--chunk-mebibytes", type=int, default=64, help="as model.head_chunk_mebibytes")
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        variant, shape, dtype, mebibytes = options.measure
        print(json.dumps(asdict(measure(variant, shape, dtype, int(mebibytes)))))
        return 0
    print(f"hidden {HIDDEN}, chunks of {options.chunk_mebibytes} MiB, medians of {options.rounds} rounds")
    print("                       extra memory, MiB                 seconds                    CPU time")
    print("       shape dtype    head     naive   share      head     naive  ratio      ratio")
    total = len(options.shape) * len(options.dtype) * options.rounds * len(VARIANTS)
    with progress("measurements", total) as advance:
        met = [
            compare(shape, dtype, options.chunk_mebibytes, options.rounds, lambda: advance(1))
            for shape in options.shape
            for dtype in options.dtype
        ]
    return 0 if all(met) else 1


if __name__ == "__main__":
    sys.exit(main())
