"""Seconds of one optimizer step with shared prompts against the same step with every trajectory apart.

    python -m tools.bench_sharing [--size 1M] [--case 512x64x8 256x256x8 64x1024x8] [--groups 4] [--rounds 5]

PROMPTxRESPONSExMEMBERS: tokens of each prompt and of each response, and responses of a group; random tokens, a
random Qwen2 model in fp32, one process. Both ways take turns on the same student with learning rate 0, so each does
the same work in every round; the first is not timed, its loss and gradient norm are compared. Ratios are separate over
shared: of tokens and of FLOPs computed, and of seconds the median over the rounds. `auto` is what a plan would choose.
"""

import argparse
import sys
import time
from dataclasses import replace
from statistics import median
from typing import Any

from megatron_offgrpo.config import LayoutConfig, ModelConfig, OptimizerConfig, PlanConfig, RunConfig
from megatron_offgrpo.progress import progress, say
from recipes.objectives import released
from tools.bench_step import PARITY, SIZES, hf_config

RULES = ("never", "always")
MAX_PACK_TOKENS = 4096


def equal_groups(prompt: int, response: int, members: int, num_groups: int, vocab_size: int) -> Any:
    """Groups of equal size and length, in memory; every other response is right."""
    import numpy as np

    from tools.step_data import MemoryStore

    total = members * num_groups
    return MemoryStore(
        group_offsets=members * np.arange(num_groups + 1),
        prompt_lengths=np.full(total, prompt),
        response_lengths=np.full(total, response),
        rewards=np.arange(total, dtype=np.float64) % 2,
        vocab_size=vocab_size,
    )


def run_of(rule: Any, num_groups: int) -> RunConfig:
    """One step of all groups; beta 0, so that no reference is needed."""
    return RunConfig(
        name="bench_sharing",
        objective=replace(released(), beta=0.0),
        plan=PlanConfig(
            groups_per_step=num_groups,
            trajectories_per_group=None,
            max_pack_tokens=MAX_PACK_TOKENS,
            pack_multiple=8,
            equal_parts=1,
            share_prompts=rule,
        ),
        optimizer=OptimizerConfig(lr=0.0),
        model=ModelConfig(precision="fp32"),
    )


def compare(case: str, size: str, num_groups: int, rounds: int) -> bool:
    """Prints a line; False where loss or gradient norm differ."""
    from megatron_offgrpo.model.hf_config import architecture_of
    from megatron_offgrpo.model.shape import shape_of
    from megatron_offgrpo.objective.compose import results
    from megatron_offgrpo.parallel import runtime
    from megatron_offgrpo.planning.flops import pack_flops
    from megatron_offgrpo.planning.plan import build_plan
    from megatron_offgrpo.training.batch import Batch, build_batch, members_of
    from megatron_offgrpo.training.step import train_step
    from megatron_offgrpo.training.student import build_student

    prompt, response, members = map(int, case.split("x"))
    store = equal_groups(prompt, response, members, num_groups, SIZES[size][-1])
    place = runtime.start(LayoutConfig(), seed=0)
    architecture = architecture_of(hf_config(size).to_dict())
    student = build_student(architecture, run_of("never", num_groups))
    plans = {rule: build_plan(store, run_of(rule, num_groups).plan, released()) for rule in (*RULES, "auto")}

    def step(rule: str) -> tuple[float, float, float]:
        plan, run = plans[rule], run_of(rule, num_groups)

        def make_batch(pack: int | None) -> Batch:
            assert pack is not None
            members = members_of(plan, pack)
            return build_batch(store, members, pack=pack, pack_multiple=8, reference=None, device=place.device)

        started = time.perf_counter()
        result = train_step(student, range(plan.num_packs), make_batch, run, place, 0.0)
        return time.perf_counter() - started, results(result.metrics)["loss"], result.grad_norm

    seconds: dict[str, list[float]] = {rule: [] for rule in RULES}
    first = {rule: step(rule)[1:] for rule in RULES}
    with progress(case, rounds) as advance:
        for _ in range(rounds):
            for rule in RULES:
                seconds[rule].append(step(rule)[0])
            advance()
    flops = {rule: float(pack_flops(plans[rule], shape_of(architecture), recompute=False).sum()) for rule in RULES}
    tokens = {rule: plans[rule].manifest.counts["padded_tokens"] for rule in RULES}
    ratio = median(a / b for a, b in zip(seconds["never"], seconds["always"], strict=True))
    chosen = "shared" if plans["auto"].manifest.counts["shared_prompt_tokens"] else "separate"
    print(
        f"{size:>5} {case:12} tokens {tokens['never']:7,} / {tokens['always']:7,} ="
        f" {tokens['never'] / tokens['always']:5.2f}  FLOPs {flops['never'] / flops['always']:5.2f}"
        f"  seconds {median(seconds['never']):7.3f} / {median(seconds['always']):7.3f} = {ratio:5.2f}  auto: {chosen}",
        flush=True,
    )
    return all(abs(a / b - 1) < PARITY for a, b in zip(*(first[rule] for rule in RULES), strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="1M", choices=list(SIZES))
    parser.add_argument("--case", nargs="+", default=["512x64x8", "256x256x8", "64x1024x8"])
    parser.add_argument("--groups", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    same = [compare(case, arguments.size, arguments.groups, arguments.rounds) for case in arguments.case]
    if not all(same):
        say(f"loss or gradient norm differ by more than {PARITY}")
    return 0 if all(same) else 1


if __name__ == "__main__":
    sys.exit(main())
