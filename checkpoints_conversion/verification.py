"""Does a Megatron checkpoint hold exactly a Hugging Face model? Weights bit for bit, then logits."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from checkpoints_conversion.apply import check_checkpoint
from checkpoints_conversion.files import bytes_of
from checkpoints_conversion.logits import build_and_load, logits_of, run_stage
from checkpoints_conversion.megatron_reader import MegatronWeights, iteration_folder
from checkpoints_conversion.planning import ConversionPlan, plan
from checkpoints_conversion.recorded import recorded_differences
from megatron_offgrpo.config import LayoutConfig
from megatron_offgrpo.progress import progress, say

TOLERANCE = 1e-4
"""Largest absolute difference of fp32 logits that counts as equal."""


@dataclass(frozen=True)
class Verification:
    """What `verify` found."""

    num_tensors: int
    differing_tensors: tuple[str, ...]
    max_logit_difference: float | None
    """None where the logits were not compared."""
    layer_differences: tuple[float, ...] = ()
    """Largest absolute difference of the hidden states after each layer but the last."""
    differing_fields: tuple[str, ...] | None = ()
    """Where the architectures differ, config.json's value first; None where the checkpoint records none."""

    @property
    def ok(self) -> bool:
        """The same architecture, every tensor equal to the bit, and the logits within the tolerance."""
        same = not self.differing_tensors and not self.differing_fields
        return same and (self.max_logit_difference or 0.0) <= TOLERANCE

    def describe(self) -> str:
        """A few lines for a person."""
        equal = self.num_tensors - len(self.differing_tensors)
        lines = [f"{equal} of {self.num_tensors} tensors equal to the bit"]
        lines += [f"  differs: {line}" for line in self.differing_tensors]
        if self.differing_fields is None:
            lines.append("architecture: the checkpoint records none, not compared")
        elif self.differing_fields:
            lines.append(f"architecture: {len(self.differing_fields)} fields differ (config.json and checkpoint)")
            lines += [f"  differs: {line}" for line in self.differing_fields]
        else:
            lines.append("architecture equal")
        if self.max_logit_difference is not None:
            lines.append(f"logits in fp32: max |difference| {self.max_logit_difference:.2e} (limit {TOLERANCE:.0e})")
            if self.max_logit_difference > TOLERANCE:
                lines += [f"  after layer {i}: {value:.2e}" for i, value in enumerate(self.layer_differences)]
        lines.append("equal" if self.ok else "NOT equal")
        return "\n".join(lines)


def verify(
    hf_dir: Path,
    megatron_dir: Path,
    *,
    iteration: int | None = None,
    prompt: str | None = None,
    compare_logits: bool = True,
    seed: int = 0,
) -> Verification:
    """Compares a Megatron checkpoint with a Hugging Face folder.

    Args:
        prompt: a text for the comparison of logits, encoded with the folder's tokenizer; by default 32 random ids.
        compare_logits: holds both models in memory, one after the other, in fp32; off for models that do not fit.

    Raises:
        CheckpointError | ConfigError: one of the two is incomplete or does not fit the other's shapes.
    """
    ready = plan(Path(hf_dir), one_dtype=True)
    folder = iteration_folder(Path(megatron_dir), iteration)
    weights = MegatronWeights(folder)
    check_checkpoint(ready.layout, weights, masters=False)
    differing = _compare_weights(ready, weights)
    names = len(ready.layout.hf_shapes())
    recorded = recorded_differences(ready.layout.architecture, weights)
    fields = None if recorded is None else tuple(recorded)
    if not compare_logits:
        return Verification(names, differing, None, differing_fields=fields)
    ids_T = _ids(ready, prompt, seed)
    say("logits of the Hugging Face model (fp32)")
    theirs, their_layers = _hf_logits(Path(hf_dir), ids_T)
    say("logits of the Megatron model (fp32)")
    ours, our_layers = _megatron_logits(ready, folder, ids_T)
    layers = tuple(float((a - b).abs().max()) for a, b in zip(our_layers, their_layers, strict=True))
    return Verification(names, differing, float((ours - theirs).abs().max()), layers, fields)


def _compare_weights(ready: ConversionPlan, weights: MegatronWeights) -> tuple[str, ...]:
    differing = []
    with progress("comparing weights (MB)", ready.total_bytes / 1e6) as advance:
        for move in ready.layout.moves:
            parts = move.op.to_hf(weights.read(move.region), ready.layout.dims)
            for name, ours in zip(move.names, parts, strict=True):
                stored = ready.source.load(name)
                # A checkpoint that was converted with --dtype is compared in its own dtype.
                theirs = stored.to(ours.dtype)
                if bytes_of(ours.contiguous()) != bytes_of(theirs):
                    different = int((ours != theirs).sum())
                    distance = float((ours.float() - theirs.float()).abs().max())
                    differing.append(f"{name}: {different} of {ours.numel()} values, by at most {distance:.3g}")
                advance(stored.nbytes / 1e6)
    return tuple(differing)


def _ids(ready: ConversionPlan, prompt: str | None, seed: int) -> Tensor:
    if prompt is None:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, ready.layout.dims.vocab, (32,), generator=generator)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ready.source.folder, trust_remote_code=False, local_files_only=True)
    return torch.tensor(tokenizer(prompt)["input_ids"])


@torch.no_grad()
def _hf_logits(hf_dir: Path, ids_T: Tensor) -> tuple[Tensor, list[Tensor]]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        hf_dir, dtype=torch.float32, trust_remote_code=False, local_files_only=True
    )
    output = model.eval()(ids_T[None], output_hidden_states=True)
    # The last entry comes after the final norm; Megatron's layers are compared before it.
    return output.logits[0], [hidden[0] for hidden in output.hidden_states[1:-1]]


def _megatron_logits(ready: ConversionPlan, folder: Path, ids_T: Tensor) -> tuple[Tensor, list[Tensor]]:
    from megatron_offgrpo.parallel import runtime

    layout = LayoutConfig()
    placement = runtime.start(layout, seed=0)
    try:
        (chunk,) = build_and_load(ready.layout.architecture, layout, folder)
        hidden, layers = run_stage(chunk.eval(), ids_T.to(placement.device))
        logits = logits_of(chunk, hidden).cpu()
    finally:
        runtime.stop()
    return logits, [layers[number][:, 0].cpu() for number in sorted(layers)][:-1]
