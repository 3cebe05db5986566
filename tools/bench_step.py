"""Seconds of one optimizer step: this trainer against plain Transformers, on the same groups with the same loss.

    python -m tools.bench_step [--size 1M 25M 100M] [--data gsm8k=32 math500=8] [--rounds 5]

Random Qwen2 models in fp32, two cores. NAME=GROUPS takes the lengths and labels of the first GROUPS problems of
trajectories/NAME.jsonl.gz, prompts up to 256 and responses up to 1,024 tokens, and random tokens. Variants:

    dp2         this trainer, two processes of one thread
    one         this trainer, one process of two threads
    plain       the best plain loop: length-sorted micro-batches, SDPA without a mask, response-only head in chunks
                whose backward pass runs at once, cached reference, fused AdamW, two threads
    checkpoint  the same with torch's checkpoint around each chunk of the head
    released    padded to the step's longest, fp32 logits of all tokens, old-log-prob and reference forward passes

Every variant is a process (dp2 two) that lives through the rounds and takes turns with the others; times are medians,
ratios medians of the rounds' ratios; CPU seconds are those of both cores. The first step is not timed: its loss and
gradient norm are compared.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from megatron_offgrpo.config import LayoutConfig, ModelConfig, OptimizerConfig, PlanConfig, RunConfig
from megatron_offgrpo.progress import progress, say
from recipes.objectives import released

SIZES = {
    "1M": (4, 128, 352, 4, 2, 2048),
    "25M": (8, 384, 1024, 6, 2, 32000),
    "100M": (12, 768, 2048, 12, 4, 32000),
}
"""Layers, hidden size, feed-forward size, heads, key-value heads, vocabulary; embeddings tied."""
VARIANTS = {"dp2": (2, 1), "one": (1, 2), "plain": (1, 2), "checkpoint": (1, 2), "released": (1, 2)}
"""Processes, and threads of each."""
SETTINGS = OptimizerConfig(lr=1e-6)
MAX_PACK_TOKENS = 4096
MICRO_BATCH_TOKENS = 4096
PARITY = 1e-4


@dataclass(frozen=True)
class Case:
    """One model on one file; `folder` holds the models and the cached reference."""

    size: str
    file: str
    num_groups: int
    folder: str


def hf_config(size: str) -> Any:
    from transformers import Qwen2Config

    layers, hidden, ffn, heads, kv_heads, vocab = SIZES[size]
    return Qwen2Config(
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocab,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
    )


def prepare(case: Case) -> None:
    """Random student and reference model, the student's Megatron checkpoint, cached reference log-probs."""
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    from checkpoints_conversion import hf_to_megatron
    from tools.step_baselines import reference_logprobs
    from tools.step_data import real_groups

    folder = Path(case.folder)
    for seed, name in enumerate(("student", "reference")):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(hf_config(case.size), dtype=torch.float32, attn_implementation="sdpa")
        model.save_pretrained(folder / name)
    hf_to_megatron(folder / "student", folder / "megatron")
    store = real_groups(Path(case.file), case.num_groups, SIZES[case.size][-1])
    logprobs = []
    for index in range(store.num_trajectories):
        tokens = store.trajectory(index)
        ids = torch.from_numpy(np.concatenate([tokens.prompt_ids, tokens.response_ids])).long()
        logprobs.append(reference_logprobs(model, ids, len(tokens.prompt_ids)))
    np.save(folder / "reference.npy", np.concatenate(logprobs))


def plan_of(case: Case) -> tuple[Any, Any, RunConfig, list[Any]]:
    """Store, plan, run and the cached reference of each trajectory."""
    import numpy as np

    from megatron_offgrpo.planning.plan import build_plan
    from tools.step_data import RESPONSE_CAP, real_groups

    store = real_groups(Path(case.file), case.num_groups, SIZES[case.size][-1])
    run = RunConfig(
        name="bench_step",
        objective=replace(released(), max_response_tokens=RESPONSE_CAP),
        plan=PlanConfig(
            groups_per_step=case.num_groups,
            trajectories_per_group=None,
            max_pack_tokens=MAX_PACK_TOKENS,
            pack_multiple=8,
            equal_parts=2,
        ),
        optimizer=SETTINGS,
        model=ModelConfig(precision="fp32"),
        layout=LayoutConfig(),
    )
    bounds = np.concatenate([[0], np.cumsum(store.response_lengths)])
    cached = np.load(Path(case.folder) / "reference.npy")
    reference = [cached[first:last] for first, last in pairwise(bounds)]
    return store, build_plan(store, run.plan, run.objective), run, reference


def trainer_step(case: Case) -> Callable[[], tuple[float, float]]:
    """A function that makes one step of this trainer; loss and gradient norm."""
    from megatron_offgrpo.model.hf_config import read_architecture
    from megatron_offgrpo.model.shape import shape_of
    from megatron_offgrpo.objective.compose import results
    from megatron_offgrpo.parallel import runtime
    from megatron_offgrpo.planning.assignment import assign
    from megatron_offgrpo.planning.flops import pack_flops
    from megatron_offgrpo.training.batch import Batch, build_batch, members_of
    from megatron_offgrpo.training.checkpoint import load_weights
    from megatron_offgrpo.training.checkpoint_folder import require_latest
    from megatron_offgrpo.training.step import train_step
    from megatron_offgrpo.training.student import build_student

    place = runtime.start(LayoutConfig(), seed=0)
    store, plan, run, reference = plan_of(case)
    architecture = read_architecture(Path(case.folder) / "student")
    student = build_student(architecture, run)
    load_weights(student, require_latest(str(Path(case.folder) / "megatron"))[0])
    packs = assign(pack_flops(plan, shape_of(architecture)), place.dp)[place.dp_rank]

    def make_batch(pack: int | None) -> Batch:
        return build_batch(
            store,
            [] if pack is None else members_of(plan, pack),
            pack=pack,
            pack_multiple=run.plan.pack_multiple,
            reference=lambda index: reference[index],
            device=place.device,
        )

    def step() -> tuple[float, float]:
        result = train_step(student, packs, make_batch, run, place, SETTINGS.lr)
        return results(result.metrics)["loss"], result.grad_norm

    return step


def plain_step(case: Case, variant: str) -> Callable[[], tuple[float, float]]:
    """A function that makes one step of a baseline; loss and gradient norm."""
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    from tools.step_baselines import PlainLoop, ReleasedProcedure, Trajectory

    store, plan, _, reference = plan_of(case)
    trajectories = []
    for entry in np.argsort(plan.trajectory):
        index = int(plan.trajectory[entry])
        tokens = store.trajectory(index)
        trajectories.append(
            Trajectory(
                ids=torch.from_numpy(np.concatenate([tokens.prompt_ids, tokens.response_ids])).long(),
                prompt=len(tokens.prompt_ids),
                advantage=float(plan.advantage[entry]),
                weight=float(plan.weight[entry]),
                reference=torch.from_numpy(reference[index]),
            )
        )

    def model(name: str) -> Any:
        folder = Path(case.folder) / name
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")

    loop: Any
    if variant == "released":
        loop = ReleasedProcedure(model("student"), model("reference"), SETTINGS)
    else:
        recompute = variant == "checkpoint"
        loop = PlainLoop(model("student"), SETTINGS, micro_batch_tokens=MICRO_BATCH_TOKENS, recompute=recompute)

    def step() -> tuple[float, float]:
        result = loop.step(trajectories)
        return result.loss, result.grad_norm

    return step


def work(variant: str, case: Case) -> None:
    """A worker: a step for each line on standard input, answered with loss, gradient norm, seconds and CPU seconds."""
    import torch

    torch.set_num_threads(VARIANTS[variant][1])
    step = trainer_step(case) if variant in ("dp2", "one") else plain_step(case, variant)
    for _ in sys.stdin:
        started, started_cpu = time.perf_counter(), time.process_time()
        loss, grad_norm = step()
        taken = time.perf_counter() - started, time.process_time() - started_cpu
        print(json.dumps([loss, grad_norm, *taken]), flush=True)


class Worker:
    """The processes of a variant, waiting for their turn."""

    def __init__(self, variant: str, case: Case) -> None:
        count, threads = VARIANTS[variant]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        command = [sys.executable, "-W", "ignore", "-m", "tools.bench_step", "--worker", variant]
        command += [json.dumps(asdict(case))]
        port = str(20000 + os.getpid() % 20000)
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115, closed by `close`
        self.processes = []
        for rank in range(count):
            if count > 1:
                environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
                environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            self.processes.append(
                subprocess.Popen(
                    command,
                    env=environment,
                    cwd=Path(__file__).resolve().parents[1],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=self.errors,
                    text=True,
                )
            )

    def step(self) -> tuple[float, float, float, float]:
        """Loss, gradient norm, seconds of the slowest process, CPU seconds of all."""
        for process in self.processes:
            assert process.stdin
            process.stdin.write("\n")
            process.stdin.flush()
        answers = []
        for process in self.processes:
            assert process.stdout
            line = process.stdout.readline()
            if not line:
                self.errors.seek(0)
                raise RuntimeError(f"a worker ended with status {process.wait()}:\n{self.errors.read()[-3000:]}")
            answers.append(json.loads(line))
        slowest, cpu_seconds = max(answer[2] for answer in answers), sum(answer[3] for answer in answers)
        return answers[0][0], answers[0][1], slowest, cpu_seconds

    def close(self) -> None:
        for process in self.processes:
            process.kill()
        self.errors.close()


def compare(size: str, name: str, file: Path, num_groups: int, rounds: int, variants: list[str]) -> bool:
    """Prints one block of the table; False where loss or gradient norm differ."""
    with tempfile.TemporaryDirectory() as folder, progress(f"{size} {name}", (rounds + 1) * len(variants)) as advance:
        case = Case(size, str(file), num_groups, folder)
        prepare(case)
        store, plan, _, _ = plan_of(case)
        workers = {variant: Worker(variant, case) for variant in variants}
        seconds: dict[str, list[float]] = {variant: [] for variant in variants}
        cpu_seconds: dict[str, list[float]] = {variant: [] for variant in variants}
        first = {}
        try:
            for number in range(rounds + 1):
                for variant, worker in workers.items():
                    loss, norm, taken, cpu_taken = worker.step()
                    if number == 0:
                        first[variant] = (loss, norm)
                    else:
                        seconds[variant].append(taken)
                        cpu_seconds[variant].append(cpu_taken)
                    advance()
        finally:
            for worker in workers.values():
                worker.close()
    tokens = int((store.prompt_lengths + store.response_lengths).sum())
    print(f"{size} {name}: {store.num_trajectories} trajectories, {tokens:,} tokens, {plan.num_packs} packs")
    ours = min((v for v in variants if v in ("dp2", "one")), key=lambda v: median(seconds[v]))
    same = True
    for variant in variants:
        ratio = median(a / b for a, b in zip(seconds[variant], seconds[ours], strict=True))
        loss, norm = first[variant]
        same &= abs(loss / first[ours][0] - 1) < PARITY and abs(norm / first[ours][1] - 1) < PARITY
        print(
            f"  {variant:10} {median(seconds[variant]):8.3f} s {tokens / median(seconds[variant]):9,.0f} tokens/s"
            f" {ratio:6.2f} x {ours} {median(cpu_seconds[variant]):8.3f} CPU s  loss {loss:.8g}  grad norm {norm:.8g}",
            flush=True,
        )
    return same


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--data", nargs="+", default=["gsm8k=32", "math500=8"], metavar="NAME=GROUPS")
    parser.add_argument("--variant", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--folder", type=Path, default=Path(__file__).resolve().parents[2] / "shared" / "data")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.worker[0], Case(**json.loads(arguments.worker[1])))
        return 0
    same = True
    for size in arguments.size:
        for item in arguments.data:
            name, _, groups = item.partition("=")
            file = arguments.folder / "trajectories" / f"{name}.jsonl.gz"
            same &= compare(size, name, file, int(groups), arguments.rounds, arguments.variant)
    if not same:
        say(f"loss or gradient norm differ by more than {PARITY}")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
