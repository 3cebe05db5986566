"""The tables of docs/parallelism.md: the recipes, and models on numbers of GPUs; layout, memory and time of each.

    python -m tools.plan_table recipes
    python -m tools.plan_table models [--card H100] [--gpus 8 32 ...] [--assume 2000x12000] [--efficiency 0.35]

`models` is the released recipe for one epoch on assumed groups; each layout is the first that `offgrpo plan --hardware`
proposes on so many GPUs.
"""

import argparse
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from megatron_offgrpo.config import RunConfig, with_values
from megatron_offgrpo.model.published import PUBLISHED, find_architecture
from megatron_offgrpo.model.shape import shape_of
from megatron_offgrpo.planning.assumed import AssumedGroups
from megatron_offgrpo.planning.estimate import typical_pack_flops
from megatron_offgrpo.planning.hardware import Hardware
from megatron_offgrpo.planning.layouts import proposals
from megatron_offgrpo.planning.memory import GIB
from megatron_offgrpo.planning.plan import Plan, build_plan
from megatron_offgrpo.recipe import list_recipes, load_recipe
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
GPUS = (8, 32, 64, 128, 256, 512)
RECIPE_HEADER = ("GPUs", "tp pp ep", "recompute", "GiB a GPU", "recipes")
MODEL_HEADER = (
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


def published_recipes() -> list[str]:
    """The recipes for models whose sizes are in the table of published models."""
    return sorted(name for name in list_recipes() if Path(load_recipe(name).paths.hf_model).name in PUBLISHED)


def recipe_table() -> list[str]:
    """The recipes for published models; those with equal numbers share a line."""
    names: dict[tuple[str, ...], list[str]] = {}
    for name in published_recipes():
        run = load_recipe(name)
        facts = plan_facts(None, run, Machine(run.layout.processes))
        layout = " ".join(str(facts["layout"][key]) for key in ("tp", "pp", "ep"))
        cells = (str(run.layout.processes), layout, _recompute(run), f"{facts['memory']['total'] / GIB:.1f}")
        names.setdefault(cells, []).append(f"`{name}`")
    lines = sorted(names.items(), key=lambda line: (int(line[0][0]), line[1]))
    return list(_lines(RECIPE_HEADER, ((*cells, ", ".join(found)) for cells, found in lines)))


def model_table(
    card: str = "H100",
    gpus: Sequence[int] = GPUS,
    assume: str = "2000x12000",
    efficiency: float = 0.35,
    price: float = 2.5,
) -> Iterator[str]:
    """The models on each number of GPUs."""
    base = openthinker3_7b()
    run = replace(base, plan=replace(base.plan, epochs=1))
    plan = build_plan(AssumedGroups.parse(assume, size=8, max_tokens=31744), run.plan, run.objective)
    rows = (
        _model_row(model, Hardware.parse(f"{count}x{card}"), run, plan, efficiency, price)
        for model in MODELS
        for count in gpus
    )
    return _lines(MODEL_HEADER, rows)


def _model_row(
    model: str, hardware: Hardware, run: RunConfig, plan: Plan, efficiency: float, price: float
) -> list[str]:
    """Only the first three columns where nothing fits."""
    shape = shape_of(find_architecture(model)[0])
    costs, keys_per_token = typical_pack_flops(plan, shape), plan.keys_per_token()
    found = proposals(shape, run, hardware, pack_costs=costs, keys_per_token=keys_per_token)
    if not found or found[0].num_gpus != hardware.num_gpus:
        return [model, str(hardware.num_gpus), "does not fit", *[""] * (len(MODEL_HEADER) - 3)]
    settled = with_values(
        replace(run, layout=found[0].layout),
        paths={"hf_model": model},
        model={"recompute": found[0].recompute},
        optimizer={"cpu_offload": found[0].offload},
    )
    facts = plan_facts(plan, settled, Machine.of(hardware, efficiency=efficiency, price=price))
    time, layout = facts["time"], facts["layout"]
    return [
        model,
        str(hardware.num_gpus),
        " ".join(str(layout[name]) for name in ("dp", "tp", "pp", "cp", "ep")),
        _recompute(settled),
        f"{facts['memory']['total'] / GIB:.1f}",
        f"{time['step_seconds']:.3g}",
        f"{time['hours']:.3g}",
        f"{time['gpu_hours']:,.0f}",
        f"{time['cost']:,.0f}",
        f"{100 * facts['balance']['worst_imbalance']:.2f} %",
    ]


def _recompute(run: RunConfig) -> str:
    return run.model.recompute + (", offload" if run.optimizer.cpu_offload else "")


def _lines(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """A table in Markdown."""
    yield f"| {' | '.join(header)} |"
    yield f"|{' --- |' * len(header)}"
    for cells in rows:
        yield f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=("recipes", "models"))
    parser.add_argument("--card", default="H100")
    parser.add_argument("--gpus", type=int, nargs="+", default=GPUS)
    parser.add_argument("--assume", default="2000x12000")
    parser.add_argument("--efficiency", type=float, default=0.35)
    parser.add_argument("--price", type=float, default=2.5)
    options = vars(parser.parse_args())
    for line in recipe_table() if options.pop("table") == "recipes" else model_table(**options):
        print(line, flush=True)


if __name__ == "__main__":
    main()
