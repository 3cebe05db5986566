"""Where a step of the benchmark spends its time, and what share of the machine's matrix rate it reaches.

    python -m tools.profile_step [--variant one] [--size 25M] [--data gsm8k=16]

One step under torch.profiler after one that is not looked at, in this process with two threads. FLOPs are those that
the plan counts; the rate of the machine is that of square matrix products in the same process.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch

from megatron_offgrpo.model.hf_config import read_architecture
from megatron_offgrpo.model.shape import shape_of
from megatron_offgrpo.planning.flops import pack_flops
from tools.bench_step import Case, plain_step, plan_of, prepare, trainer_step


def matrix_rate(side: int = 1536, rounds: int = 5) -> float:
    """FLOP/s of fp32 products of square matrices, the best of some."""
    left, right = torch.randn(side, side), torch.randn(side, side)
    best = float("inf")
    for _ in range(rounds):
        started = time.perf_counter()
        left @ right
        best = min(best, time.perf_counter() - started)
    return 2 * side**3 / best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="one", choices=("one", "plain", "checkpoint", "released"))
    parser.add_argument("--size", default="25M")
    parser.add_argument("--data", default="gsm8k=16", metavar="NAME=GROUPS")
    parser.add_argument("--folder", type=Path, default=Path(__file__).resolve().parents[2] / "shared" / "data")
    arguments = parser.parse_args()
    name, _, groups = arguments.data.partition("=")
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as folder:
        file = arguments.folder / "trajectories" / f"{name}.jsonl.gz"
        case = Case(arguments.size, str(file), int(groups), folder)
        prepare(case)
        _, plan, _, _ = plan_of(case)
        flops = float(pack_flops(plan, shape_of(read_architecture(Path(folder) / "student")), recompute=False).sum())
        step = trainer_step(case) if arguments.variant == "one" else plain_step(case, arguments.variant)
        step()
        started, started_cpu = time.perf_counter(), time.process_time()
        step()
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - started_cpu
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            step()
    rate = matrix_rate()
    print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=18, max_name_column_width=48))
    print(f"step {seconds:.3f} s, {cpu_seconds:.3f} s of both cores; {flops:.4g} FLOPs by the plan")
    print(f"machine {rate / 1e9:.1f} GFLOP/s in matrix products; the step reaches {100 * flops / seconds / rate:.1f} %")


if __name__ == "__main__":
    main()
