"""What a plan will take on the recipe's layout, as values for a program and as lines for the terminal."""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from megatron_offgrpo.config import RunConfig
from megatron_offgrpo.errors import ConfigError
from megatron_offgrpo.model.published import find_architecture
from megatron_offgrpo.model.shape import shape_of
from megatron_offgrpo.planning.divides import check_divides
from megatron_offgrpo.planning.estimate import ENOUGH_PACKS, balance, packs_lower_bound, run_cost, typical_pack_flops
from megatron_offgrpo.planning.flops import pack_flops
from megatron_offgrpo.planning.hardware import Hardware
from megatron_offgrpo.planning.layouts import Proposal, proposals
from megatron_offgrpo.planning.memory import GIB, memory_per_rank
from megatron_offgrpo.planning.plan import Plan
from megatron_offgrpo.planning.shape import ModelShape

Facts = dict[str, Any]
NOTES = {
    "silent_groups_dropped": "silent groups dropped",
    "validation_groups": "groups set apart for validation",
    "trajectories_cut": "trajectories left out by trajectories_per_group or with dropped groups",
    "trajectories_repeated": "repeats of trajectories in short groups an epoch",
    "trajectories_masked": "truncated responses with weight 0 an epoch",
    "trajectories_empty": "empty responses with weight 0 an epoch",
}


@dataclass(frozen=True)
class Machine:
    """What the run is estimated for."""

    num_gpus: int
    hardware: Hardware | None = None
    tflops_per_gpu: float | None = None
    """Achieved 10^12 FLOP/s of one GPU."""
    price: float | None = None
    """Of one GPU for an hour."""

    def __post_init__(self) -> None:
        if self.price is not None and not 0 <= self.price < math.inf:
            raise ConfigError("not a price", where="--price", expected="a finite number, at least 0", got=self.price)

    @staticmethod
    def of(hardware: Hardware, *, efficiency: float, price: float | None) -> "Machine":
        """Named hardware at a share of its peak rate."""
        rate = None if hardware.peak_tflops is None else efficiency * hardware.peak_tflops
        return Machine(hardware.num_gpus, hardware, rate, price)


def plan_lines(plan: Plan, run: RunConfig, *, tflops_per_gpu: float | None = None) -> list[str]:
    """Steps, packs, padding, tokens, and the estimated memory and time on the recipe's processes."""
    machine = Machine(run.layout.processes, tflops_per_gpu=tflops_per_gpu)
    return fact_lines(plan_facts(plan, run, machine))


def plan_facts(plan: Plan | None, run: RunConfig, machine: Machine) -> Facts:
    """Everything known before the run, as JSON-able values; without a plan what depends on the model alone.

    Raises:
        ConfigError: a layout that these GPUs, the model or the packs cannot take.
    """
    architecture, source = find_architecture(run.paths.hf_model)
    shape = shape_of(architecture)
    run.check_layout(machine.num_gpus)
    check_divides(shape, run.layout, run.model)
    layout = {**asdict(run.layout), "gpus": machine.num_gpus}
    layout["dp"] = run.layout.data_parallel_size(machine.num_gpus)
    facts: Facts = {
        "recipe": run.name,
        "model": {"source": source, "parameters": shape.num_parameters},
        "layout": layout,
        "recompute": run.model.recompute,
    }
    if plan is not None:
        facts |= _work(plan, run, machine, shape)
        facts["plan"] = _counts(plan, facts["balance"]["zero_weight_packs"] * run.plan.pack_multiple)
    return facts | {"memory": _memory(run, machine, shape, plan)}


def require_fit(facts: Facts) -> None:
    """Refuses a layout that does not fit into the named hardware's memory.

    Raises:
        ConfigError: with the settings of layouts that fit.
    """
    memory = facts["memory"]
    if memory.get("fits", True):
        return
    found = "; or ".join(
        f"{other['settings']} (about {other['total'] / GIB:.1f} GiB on each of {other['gpus']} GPUs"
        + (", and the optimizer in their hosts' memory)" if other["offload"] else ")")
        for other in memory["proposals"]
    )
    raise ConfigError(
        "the run does not fit into the GPUs' memory",
        where="layout",
        expected=f"at most {memory['usable'] / GIB:.1f} GiB a GPU",
        got=f"{memory['total'] / GIB:.1f} GiB",
        remedy=found or "no layout on any number of GPUs was found; use a smaller plan.max_pack_tokens",
    )


def _counts(plan: Plan, zero_weight_tokens: int) -> Facts:
    counts = dict(plan.manifest.counts)
    return {
        **counts,
        "packs_lower_bound": packs_lower_bound(plan),
        "longest_pack": int(plan.pack_padded.max()),
        "fill": counts["tokens"] / (counts["padded_tokens"] + zero_weight_tokens),
        "trajectories_of_first_step": plan.num_trajectories_of_step(0),
        "trajectories_of_last_step": plan.num_trajectories_of_step(plan.num_steps - 1),
    }


def _work(plan: Plan, run: RunConfig, machine: Machine, shape: ModelShape) -> Facts:
    """FLOPs, balance and time."""
    recompute = run.model.recompute == "full"
    even = balance(plan, shape, run.layout, num_gpus=machine.num_gpus, recompute=recompute)
    model_flops = float(pack_flops(plan, shape).sum())
    facts: Facts = {
        "flops": {"model": model_flops, "computed": float(pack_flops(plan, shape, recompute=recompute).sum())},
        "balance": {
            "worst_imbalance": even.worst,
            "worst_imbalance_with_8_packs_a_rank": even.worst_with_enough_packs,
            "steps_with_8_packs_a_rank": even.steps_with_enough_packs,
            "zero_weight_packs": even.zero_weight_packs,
        },
    }
    if machine.tflops_per_gpu is not None:
        cost = run_cost(even, num_gpus=machine.num_gpus, tflops_per_gpu=machine.tflops_per_gpu)
        facts["time"] = {"tflops_per_gpu": machine.tflops_per_gpu, **asdict(cost)}
        if machine.hardware and machine.hardware.peak_tflops:
            facts["time"]["mfu"] = model_flops / (cost.gpu_hours * 3600e12 * machine.hardware.peak_tflops)
        if machine.price is not None:
            facts["time"]["cost"] = machine.price * cost.gpu_hours
    return facts


def _memory(run: RunConfig, machine: Machine, shape: ModelShape, plan: Plan | None) -> Facts:
    longest = run.plan.max_pack_tokens if plan is None else int(plan.pack_padded.max())
    keys_per_token = 1.0 if plan is None else plan.keys_per_token()
    memory = memory_per_rank(
        shape,
        run.layout,
        run.model,
        num_gpus=machine.num_gpus,
        max_pack_tokens=longest,
        keys_per_token=keys_per_token,
        offload=run.optimizer.cpu_offload,
    )
    found: Facts = {**asdict(memory), "total": memory.total, "pack_tokens": longest}
    hardware = machine.hardware
    if hardware is None:
        return found
    fits = memory.total <= hardware.usable_bytes
    found |= {"card": hardware.card, "gpu": hardware.memory_bytes, "usable": hardware.usable_bytes, "fits": fits}
    if not fits:
        longest_run = replace(run, plan=replace(run.plan, max_pack_tokens=longest))
        costs = np.ones(8 * machine.num_gpus) if plan is None else typical_pack_flops(plan, shape)
        others = proposals(shape, longest_run, hardware, pack_costs=costs, keys_per_token=keys_per_token)
        found["proposals"] = [_proposal(other) for other in others]
    return found


def _proposal(found: Proposal) -> Facts:
    settings, total = found.settings(), found.memory.total
    return {"gpus": found.num_gpus, "settings": settings, "offload": found.offload, "total": total}


def fact_lines(facts: Facts) -> list[str]:
    """The facts for a reader."""
    lines = [*_plan_lines(facts["plan"])] if "plan" in facts else []
    lines.append(f"parameters     {facts['model']['parameters']:,} ({facts['model']['source']})")
    layout = facts["layout"]
    dimensions = " ".join(f"{name}={layout[name]}" for name in ("dp", "tp", "pp", "vpp", "cp", "ep"))
    lines.append(f"layout         {layout['gpus']} GPUs: {dimensions}, recompute {facts['recompute']}")
    if "flops" in facts:
        flops = facts["flops"]
        lines.append(f"FLOPs          {flops['model']:.4g} of the model, {flops['computed']:.4g} computed")
        lines += _balance_lines(facts["balance"])
    memory = facts["memory"]
    parts = ("weights", "gradients", "optimizer", "activations", "working", "logits")
    detail = ", ".join(f"{name} {memory[name] / GIB:.2f}" for name in parts)
    of = f" of {memory['gpu'] / GIB:.1f} ({memory['card']})" if "gpu" in memory else ""
    lines.append(f"memory         about {memory['total'] / GIB:.2f} GiB{of} on the fullest rank")
    lines.append(f"               {detail}; packs of {memory['pack_tokens']:,} tokens")
    if "time" in facts:
        time = facts["time"]
        cost = f", cost {time['cost']:,.0f}" if "cost" in time else ""
        mfu = f", MFU {100 * time['mfu']:.0f} %" if "mfu" in time else ""
        lines.append(
            f"time           {time['hours']:.3g} h, {time['step_seconds']:.3g} s a step, {time['gpu_hours']:.3g} "
            f"GPU-hours{cost} at an assumed {time['tflops_per_gpu']:g} TFLOP/s a GPU{mfu}"
        )
    return lines


def _plan_lines(plan: Facts) -> list[str]:
    first, last = plan["trajectories_of_first_step"], plan["trajectories_of_last_step"]
    per_step = f"{first}" if first == last else f"{first}, in the last step {last}"
    fill = 100 * plan["fill"]
    shared = plan.get("shared_prompt_tokens", 0)
    without = 100 * shared / (plan["tokens"] + shared)
    lines = [
        f"steps          {plan['steps']} ({per_step} trajectories a step)",
        f"trajectories   {plan['trajectories']:,} from {plan['groups_per_epoch']:,} groups an epoch",
        f"tokens         {plan['tokens']:,}, of them {plan['response_tokens']:,} in responses",
        f"prompts        shared: {shared:,} tokens fewer ({without:.1f} %)" if shared else "prompts        not shared",
        f"packs          {plan['packs']:,} of at most {plan['longest_pack']:,} tokens "
        f"(lower bound {plan['packs_lower_bound']:,})",
        f"padding        {100 - fill:.3f} % of the tokens computed (fill {fill:.3f} %)",
    ]
    return lines + [f"               {plan[name]:,} {text}" for name, text in NOTES.items() if plan.get(name)]


def _balance_lines(even: Facts) -> list[str]:
    lines = [
        f"balance        dearest data-parallel rank at most {100 * even['worst_imbalance']:.2f} % over the mean, "
        f"{even['zero_weight_packs']} zero-weight packs"
    ]
    with_enough = even["worst_imbalance_with_8_packs_a_rank"]
    if with_enough is not None and with_enough != even["worst_imbalance"]:
        steps = even["steps_with_8_packs_a_rank"]
        lines.append(
            f"               {100 * with_enough:.2f} % in the {steps} steps with {ENOUGH_PACKS} packs a rank or more"
        )
    return lines
