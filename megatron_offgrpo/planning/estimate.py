"""What a plan costs: FLOPs, memory per rank, hours; for a dense or mixture-of-experts GPT with GQA and SwiGLU.

Bytes of activations and hours are estimates; parameter and FLOP counts are exact for the formulas given.
"""

import itertools
from dataclasses import dataclass

import numpy as np

from megatron_offgrpo.config import LayoutConfig, ModelConfig
from megatron_offgrpo.errors import ConfigError
from megatron_offgrpo.planning.assignment import assign, imbalance
from megatron_offgrpo.planning.packing import lower_bound
from megatron_offgrpo.planning.plan import Plan
from megatron_offgrpo.types import FloatArray, IntArray

GIB = 2**30
HEAD_CHUNKS = 3
"""fp32 chunks alive at once in the log-prob head: logits, probabilities, gradient."""


@dataclass(frozen=True)
class ModelShape:
    """The sizes that parameters, FLOPs and memory depend on."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    """Of a dense layer, or of one expert where num_experts > 0."""
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    tied_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    num_experts: int = 0
    """0: dense."""
    experts_per_token: int = 0

    @property
    def query_size(self) -> int:
        return self.num_attention_heads * self.head_dim

    @property
    def key_value_size(self) -> int:
        return 2 * self.num_query_groups * self.head_dim

    @property
    def attention_matrices(self) -> int:
        """Parameters of one layer's QKV and output projections."""
        return self.hidden_size * (2 * self.query_size + self.key_value_size)

    @property
    def mlp_matrices(self) -> int:
        """Parameters of one dense SwiGLU MLP, or of one expert: gate, up and down."""
        return 3 * self.hidden_size * self.ffn_hidden_size

    @property
    def layer_vectors(self) -> int:
        """Parameters of one layer that are no matrices: two norms, QKV bias, query and key norms."""
        bias = self.query_size + self.key_value_size if self.qkv_bias else 0
        return 2 * self.hidden_size + bias + (2 * self.head_dim if self.qk_norm else 0)

    @property
    def router(self) -> int:
        return self.hidden_size * self.num_experts

    @property
    def embedding(self) -> int:
        return self.vocab_size * self.hidden_size

    @property
    def num_parameters(self) -> int:
        """All parameters, exact."""
        layer = self.attention_matrices + self.layer_vectors + self.router
        layer += self.mlp_matrices * max(1, self.num_experts)
        return self.num_layers * layer + self.hidden_size + self.embedding * (1 if self.tied_embeddings else 2)

    @property
    def matmul_parameters_per_token(self) -> int:
        """Parameters of the matrices that one token passes in the layers, without embedding and head."""
        active = self.experts_per_token if self.num_experts else 1
        return self.num_layers * (self.attention_matrices + self.router + active * self.mlp_matrices)


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest rank."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    head: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations + self.head


@dataclass(frozen=True)
class Cost:
    """What a run takes on a given number of GPUs."""

    flops: float
    """Of all packs, recompute included where the layers are recomputed."""
    worst_imbalance: float
    """Dearest data-parallel rank over the mean, minus 1, in the worst step."""
    zero_weight_packs: int
    """Appended so that every rank has as many packs."""
    hours: float
    gpu_hours: float


def pack_flops(plan: Plan, shape: ModelShape, *, recompute: bool = False) -> FloatArray:
    """FLOPs of a training step on each pack, forward and backward.

    Per token 6 per matrix parameter of the layers (2 forward, 4 backward; padding tokens included), per trajectory
    of l tokens 6 * num_layers * query_size * l^2 (QK^T and PV, causal: half of 12, after Narayanan et al. 2021), and
    6 * hidden * vocabulary per response token for the head. Recomputing the layers adds a forward pass: 8 for 6.

    Returns:
        float64 [num_packs].
    """
    per_pass = 8.0 if recompute else 6.0
    lengths = plan.tokens.astype(np.float64)
    attention = per_pass * shape.num_layers * shape.query_size * lengths**2
    head = 6.0 * shape.embedding * plan.response_tokens
    entries = np.bincount(plan.pack, weights=attention + head, minlength=plan.num_packs)
    return entries + per_pass * shape.matmul_parameters_per_token * plan.pack_padded


def memory_per_rank(
    shape: ModelShape, layout: LayoutConfig, model: ModelConfig, *, num_gpus: int, max_pack_tokens: int
) -> Memory:
    """Bytes on the fullest pipeline stage, with the distributed optimizer.

    Weights 2 bytes in bf16 (4 in fp32), gradients 4 (fp32 buffer), AdamW 12 (fp32 master weights and two moments; 8
    where the weights are fp32 themselves) over the ranks that share the parameters. Activations: see
    `_layer_activations`; 1F1B keeps minpp micro-batches on the first stage, interleaving
    1 + (pp - 1) / (pp * vpp) times as much (Korthikanti et al. 2022, section 4.2.3).

    Raises:
        ConfigError: the number of GPUs is no multiple of the layout.
    """
    dp = layout.data_parallel_size(num_gpus)
    if dp * layout.cp % layout.ep:
        raise ConfigError(
            "must divide dp * cp", where="layout.ep", expected=f"a divisor of {dp * layout.cp}", got=layout.ep
        )
    width = 2 if model.precision == "bf16" else 4
    layers = -(-shape.num_layers // layout.pp)
    # Expert matrices are sharded over tp and ep, all other matrices and the embeddings over tp.
    dense_layer = (shape.attention_matrices + (0 if shape.num_experts else shape.mlp_matrices)) / layout.tp
    dense_layer += shape.router + shape.layer_vectors
    experts = layers * shape.num_experts * shape.mlp_matrices / (layout.tp * layout.ep)
    ends = 1 if layout.pp > 1 or shape.tied_embeddings else 2
    dense = layers * dense_layer + ends * shape.embedding / layout.tp + shape.hidden_size
    states = 12 if model.precision == "bf16" else 8
    optimizer = states * (dense / (dp * layout.cp) + experts * layout.ep / (dp * layout.cp))
    tokens = max_pack_tokens / layout.cp
    layer = _layer_activations(shape, layout, width) * tokens
    in_flight = float(layers * layout.pp)
    if layout.vpp > 1:
        in_flight *= 1 + (layout.pp - 1) / (layout.pp * layout.vpp)
    if model.recompute == "full":
        kept = width * shape.hidden_size * tokens / (layout.tp if layout.sequence_parallel else 1)
        activations = in_flight * kept + layer
    else:
        activations = in_flight * layer
    head = HEAD_CHUNKS * model.head_chunk_mebibytes * 2**20 + 2 * width * shape.hidden_size * tokens
    return Memory(width * (dense + experts), 4 * (dense + experts), optimizer, activations, head)


def _layer_activations(shape: ModelShape, layout: LayoutConfig, width: int) -> float:
    """Bytes that one layer keeps per token for its backward pass, on one tensor-parallel rank.

    Inputs of both norms and of both column-parallel projections (4 h; sharded only with sequence parallelism), Q, K
    and V, the attention output, and gate, up and their product (3 f); attention itself is recomputed by its kernel.
    After Korthikanti et al. 2022, section 4.1, for GQA, SwiGLU and no dropout. Experts: each of the token's k copies
    keeps its input and 3 f.
    """
    replicated = 4 * shape.hidden_size / (layout.tp if layout.sequence_parallel else 1)
    sharded = 2 * shape.query_size + shape.key_value_size
    if shape.num_experts:
        sharded += shape.experts_per_token * (shape.hidden_size + 3 * shape.ffn_hidden_size)
    else:
        sharded += 3 * shape.ffn_hidden_size
    return width * (replicated + sharded / layout.tp)


def run_cost(
    plan: Plan,
    shape: ModelShape,
    layout: LayoutConfig,
    *,
    num_gpus: int,
    tflops_per_gpu: float,
    recompute: bool = False,
) -> Cost:
    """Time of the run at an assumed rate: per step, the dearest data-parallel rank's FLOPs over its GPUs' rate.

    Args:
        tflops_per_gpu: achieved 10^12 FLOP/s of one GPU, pipeline bubbles and communication included.
    """
    dp = layout.data_parallel_size(num_gpus)
    flops = pack_flops(plan, shape, recompute=recompute)
    critical, worst, empty = 0.0, 0.0, 0
    for step in range(plan.num_steps):
        packs = plan.packs_of_step(step)
        costs = flops[packs.start : packs.stop]
        ranks = assign(costs, dp, layout.pp if layout.vpp > 1 else 1)
        unevenness = imbalance(costs, ranks)
        critical += (1 + unevenness) * float(costs.sum()) / dp
        worst = max(worst, unevenness)
        empty += sum(len(rank) for rank in ranks) - len(packs)
    hours = critical / (num_gpus / dp * tflops_per_gpu * 1e12) / 3600
    return Cost(float(flops.sum()), worst, empty, hours, hours * num_gpus)


def packs_lower_bound(plan: Plan) -> int:
    """Sum over the steps of the packs that any packing needs."""
    capacity = plan.manifest.config["plan"]["max_pack_tokens"]
    capacity -= capacity % plan.manifest.config["plan"]["pack_multiple"]
    starts: IntArray = np.searchsorted(plan.step, np.arange(plan.num_steps + 1))
    return sum(lower_bound(plan.tokens[a:b].astype(np.int64), capacity) for a, b in itertools.pairwise(starts))


def summary_lines(
    plan: Plan,
    *,
    shape: ModelShape | None = None,
    layout: LayoutConfig | None = None,
    model: ModelConfig | None = None,
    num_gpus: int = 1,
    tflops_per_gpu: float | None = None,
) -> list[str]:
    """The facts that are printed before a run; memory and time where the model, the layout and a rate are given."""
    counts = plan.manifest.counts
    first, last = plan.num_trajectories_of_step(0), plan.num_trajectories_of_step(plan.num_steps - 1)
    per_step = f"{first}" if first == last else f"{first}, in the last step {last}"
    fill = counts["tokens"] / counts["padded_tokens"]
    lines = [
        f"steps          {plan.num_steps} ({per_step} trajectories a step)",
        f"trajectories   {counts['trajectories']:,} from {counts['groups_per_epoch']:,} groups an epoch",
        f"tokens         {counts['tokens']:,}, of them {counts['response_tokens']:,} in responses",
        f"packs          {plan.num_packs:,} of at most {int(plan.pack_padded.max()):,} tokens "
        f"(lower bound {packs_lower_bound(plan):,})",
        f"padding        {100 * (1 - fill):.3f} % of the tokens computed (fill {100 * fill:.3f} %)",
    ]
    notes = {
        "silent_groups_dropped": "silent groups dropped",
        "trajectories_cut": "trajectories left out by trajectories_per_group or with dropped groups",
        "trajectories_repeated": "repeats of trajectories in short groups an epoch",
        "trajectories_masked": "truncated responses with weight 0 an epoch",
        "trajectories_empty": "empty responses with weight 0 an epoch",
    }
    lines += [f"               {counts[name]:,} {text}" for name, text in notes.items() if counts[name]]
    if shape is None:
        return lines
    layout, model = layout or LayoutConfig(), model or ModelConfig()
    recompute = model.recompute == "full"
    flops = pack_flops(plan, shape, recompute=recompute)
    lines.append(f"parameters     {shape.num_parameters:,}")
    lines.append(f"FLOPs          {flops.sum():.4g}, {flops.sum() / plan.num_steps:.4g} a step")
    memory = memory_per_rank(shape, layout, model, num_gpus=num_gpus, max_pack_tokens=int(plan.pack_padded.max()))
    parts = ("weights", "gradients", "optimizer", "activations", "head")
    detail = ", ".join(f"{name} {getattr(memory, name) / GIB:.2f}" for name in parts)
    lines.append(f"memory         about {memory.total / GIB:.2f} GiB on the fullest of {num_gpus} ranks ({detail})")
    if tflops_per_gpu is not None:
        cost = run_cost(plan, shape, layout, num_gpus=num_gpus, tflops_per_gpu=tflops_per_gpu, recompute=recompute)
        lines.append(
            f"time           {cost.hours:.3g} h, {cost.gpu_hours:.3g} GPU-hours "
            f"at an assumed {tflops_per_gpu:g} TFLOP/s a GPU"
        )
        lines.append(
            f"balance        dearest data-parallel rank at most {100 * cost.worst_imbalance:.2f} % over the mean, "
            f"{cost.zero_weight_packs} zero-weight packs"
        )
    return lines
