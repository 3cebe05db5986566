"""Which packs of a plan this process computes, and their batches."""

from megatron_offgrpo.config import RunConfig
from megatron_offgrpo.model.shape import shape_of
from megatron_offgrpo.parallel.runtime import Placement
from megatron_offgrpo.planning.assignment import assign
from megatron_offgrpo.planning.flops import pack_flops
from megatron_offgrpo.planning.plan import Plan
from megatron_offgrpo.training.batch import Batch, build_batch, members_of
from megatron_offgrpo.training.inputs import Inputs
from megatron_offgrpo.training.step import MakeBatch


def own_packs(plan: Plan, packs: range, inputs: Inputs, run: RunConfig, place: Placement) -> list[int | None]:
    """This rank's share of the packs, by the plan's numbers; None is a zero-weight pack."""
    group = run.layout.pp if run.layout.vpp > 1 else 1
    costs = pack_flops(plan, shape_of(inputs.architecture), recompute=run.model.recompute == "full", packs=packs)
    mine = assign(costs, place.dp, group)[place.dp_rank]
    return [None if number is None else packs[number] for number in mine]


def batches_of(plan: Plan, inputs: Inputs, run: RunConfig, place: Placement) -> MakeBatch:
    """Makes the batch of a pack of the plan, and that of a zero-weight pack."""

    def make_batch(pack: int | None) -> Batch:
        return build_batch(
            inputs.store,
            [] if pack is None else members_of(plan, pack),
            pack=pack,
            pack_multiple=run.plan.pack_multiple,
            reference=inputs.reference.lookup if inputs.reference else None,
            device=place.device,
            cp=place.cp,
            cp_rank=place.cp_rank,
        )

    return make_batch
