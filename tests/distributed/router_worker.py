"""What the processes of the router tests do: the routers' gradients under the load-balancing loss."""

from pathlib import Path

import torch

from megatron_offgrpo.config import LayoutConfig, RunConfig, with_values
from megatron_offgrpo.data.store import TrajectoryStore
from megatron_offgrpo.parallel import runtime
from tests.distributed.layout_worker import gradient
from tests.distributed.toy import toy_run


def run_of(layout: dict, router: str) -> RunConfig:
    run = toy_run(LayoutConfig(**layout))
    return with_values(run, model={"router": router, "balance_coefficient": 1e-3})


def router_gradients(run: RunConfig, store: str | Path, place: runtime.Placement, weights: str | Path) -> torch.Tensor:
    """[layers, experts, hidden] of step 0."""
    student, *_ = gradient(run, "qwen3_moe", TrajectoryStore.open(store), place, Path(weights))
    return torch.stack([router.weight.main_grad for router in student.models[0].routers])


def write_gradients(store: str, weights: str, output: str, layouts: dict[str, dict]) -> None:
    for name, layout in layouts.items():
        run = run_of(layout, "balanced")
        place = runtime.start(run.layout, seed=0)
        found = router_gradients(run, store, place, weights)
        if place.is_writer:
            torch.save(found, Path(output) / f"{name}.pt")
    runtime.stop()
