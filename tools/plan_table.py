"""The table of docs/parallelism.md: for models and numbers of GPUs a layout that fits, its memory and time.

    python -m tools.plan_table [--card H100] [--gpus 8 32 ...] [--assume 2000x12000] [--efficiency 0.35] [--price 2.5]

The released recipe for one epoch on assumed groups; each layout is the one that `offgrpo plan --hardware` proposes.
"""

import argparse
from dataclasses import replace

from megatron_offgrpo.config import RunConfig
from megatron_offgrpo.model.published import find_architecture
from megatron_offgrpo.model.shape import shape_of
from megatron_offgrpo.planning.assumed import AssumedGroups
from megatron_offgrpo.planning.hardware import Hardware
from megatron_offgrpo.planning.layouts import propose
from megatron_offgrpo.planning.memory import GIB
from megatron_offgrpo.planning.plan import Plan, build_plan
from megatron_offgrpo.reporting.plan_summary import Machine, plan_facts
from recipes.openthinker3 import openthinker3_7b

MODELS = (
    "OpenThinker3-7B",
    "Qwen3-8B",
    "DeepSeek-R1-Distill-Qwen-32B",
    "Llama-3.3-70B-Instruct",
    "Qwen3-30B-A3B",
    "Qwen3-235B-A22B",
)
HEADER = (
    "model",
    "GPUs",
    "dp tp pp cp ep",
    "recompute",
    "GiB a GPU",
    "s a step",
    "h",
    "GPU-hours",
    "cost",
    "imbalance",
)


def row(model: str, hardware: Hardware, run: RunConfig, plan: Plan, efficiency: float, price: float) -> list[str]:
    """One line; only the first two columns where nothing fits."""
    shape = shape_of(find_architecture(model)[0])
    found = propose(shape, run, hardware, packs_per_step=plan.num_packs / plan.num_steps)
    if found is None:
        return [model, str(hardware.num_gpus), "does not fit", *[""] * (len(HEADER) - 3)]
    settled = replace(
        run,
        paths=replace(run.paths, hf_model=model),
        layout=found.layout,
        model=replace(run.model, recompute=found.recompute),
    )
    facts = plan_facts(plan, settled, Machine.of(hardware, efficiency=efficiency, price=price))
    time, layout = facts["time"], facts["layout"]
    return [
        model,
        str(hardware.num_gpus),
        " ".join(str(layout[name]) for name in ("dp", "tp", "pp", "cp", "ep")),
        found.recompute,
        f"{facts['memory']['total'] / GIB:.1f}",
        f"{time['step_seconds']:.3g}",
        f"{time['hours']:.3g}",
        f"{time['gpu_hours']:,.0f}",
        f"{time['cost']:,.0f}",
        f"{100 * facts['balance']['worst_imbalance']:.2f} %",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--card", default="H100")
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 32, 64, 128, 256, 512])
    parser.add_argument("--assume", default="2000x12000")
    parser.add_argument("--efficiency", type=float, default=0.35)
    parser.add_argument("--price", type=float, default=2.5)
    arguments = parser.parse_args()
    base = openthinker3_7b()
    run = replace(base, plan=replace(base.plan, epochs=1))
    plan = build_plan(AssumedGroups.parse(arguments.assume, size=8, max_tokens=31744), run.plan, run.objective)
    print(f"| {' | '.join(HEADER)} |\n|{' --- |' * len(HEADER)}")
    for model in MODELS:
        for count in arguments.gpus:
            hardware = Hardware.parse(f"{count}x{arguments.card}")
            cells = row(model, hardware, run, plan, arguments.efficiency, arguments.price)
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
