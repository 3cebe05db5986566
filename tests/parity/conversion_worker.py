"""What each rank does in the conversion parity tests: loads a converted model in a layout and writes its logits."""

from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from checkpoints_conversion.logits import build_and_load, logits_of, run_stage
from checkpoints_conversion.megatron_reader import iteration_folder
from megatron_offgrpo.config import LayoutConfig
from megatron_offgrpo.model.hf_config import read_architecture
from megatron_offgrpo.parallel import runtime


def write_logits(cases: list[dict], ids: list[int], output: str) -> None:
    """Writes output/NAME.pt, the [T, V] logits of each case (name, hf, megatron, layout)."""
    for case in cases:
        layout = LayoutConfig(**case["layout"])
        place = runtime.start(layout, seed=0)
        architecture = read_architecture(case["hf"])
        chunks = build_and_load(architecture, layout, iteration_folder(Path(case["megatron"])))
        hidden = _through_stages(chunks, layout, torch.tensor(ids), architecture.hidden_size)
        if place.is_last_stage:
            logits = logits_of(chunks[-1], hidden)
            if place.reports_loss and place.dp_rank == 0:
                torch.save(logits, Path(output) / f"{case['name']}.pt")
        dist.barrier()
    runtime.stop()


def _through_stages(chunks: list, layout: LayoutConfig, ids_T: torch.Tensor, hidden_size: int) -> torch.Tensor | None:
    """Hidden states after the last stage; None on processes that do not hold it."""
    pp_rank = parallel_state.get_pipeline_model_parallel_rank()
    num_stages, hidden = layout.pp * layout.vpp, None
    for stage in range(num_stages):
        if stage % layout.pp != pp_rank:
            continue
        if stage > 0 and layout.pp > 1:
            hidden = torch.empty(len(ids_T), 1, hidden_size)
            dist.recv(hidden, parallel_state.get_pipeline_model_parallel_prev_rank())
        hidden, _ = run_stage(chunks[stage // layout.pp].eval(), ids_T, hidden)
        if stage < num_stages - 1 and layout.pp > 1:
            dist.send(hidden, parallel_state.get_pipeline_model_parallel_next_rank())
            hidden = None
    return hidden
