"""Bytes on the fullest rank, by part; docs/parallelism.md derives the formulas.

Activations are those of this project's layers, tensor by tensor, and agree with what autograd saves: a test
measures. Attention has no T^2 term: its kernels keep queries, keys, values, output and one number per head and token.
"""

from dataclasses import dataclass, replace

from megatron_offgrpo.config import LayoutConfig, ModelConfig
from megatron_offgrpo.planning.shape import ModelShape

GIB = 2**30


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest rank."""

    weights: float
    gradients: float
    """The fp32 buffer that gradients are accumulated in."""
    optimizer: float
    activations: float
    """What is kept for the backward pass of all packs in flight."""
    working: float
    """Temporaries of the layer in work: its gradients, and with full recompute its activations."""
    logits: float
    """The head: blocks of logits, its inputs, and the gradients of its inputs."""

    @property
    def total(self) -> float:
        """The head and the layers work one after the other."""
        kept = self.weights + self.gradients + self.optimizer + self.activations
        return kept + max(self.working, self.logits)


@dataclass(frozen=True)
class Kernels:
    """Which copies the layers keep; they differ between the portable CPU path and a GPU."""

    fused_norm: bool = True
    """torch's rms_norm keeps its input only; on a CPU it keeps that and the normalised input, in fp32."""
    joined_attention: bool = True
    """One kernel call for all segments; on a CPU each segment's output is kept beside the joined one."""

    def norm_width(self, width: int) -> int:
        """Bytes that a norm keeps of each value of its input, in place of that where it is not fp32."""
        return width if self.fused_norm else 8


GPU = Kernels()
CPU = Kernels(fused_norm=False, joined_attention=False)


def memory_per_rank(
    shape: ModelShape,
    layout: LayoutConfig,
    model: ModelConfig,
    *,
    num_gpus: int,
    max_pack_tokens: int,
    keys_per_token: float = 1.0,
    offload: bool = False,
    kernels: Kernels = GPU,
) -> Memory:
    """Bytes on the fullest rank with the distributed optimizer.

    Weights 2 bytes in bf16 (4 in fp32), with fp8 a layer's matrices 4; gradients 4 (fp32 buffer); AdamW 12 (fp32 master
    weights and two moments; 8 where the weights are fp32 themselves) over the ranks that share the parameters.

    Args:
        keys_per_token: keys that a pack's responses see, over its tokens; above 1 where prompts are shared.
        offload: the optimizer is in the CPU's memory.

    Raises:
        ConfigError: the number of GPUs does not fit the layout.
    """
    layout.data_parallel_size(num_gpus)
    of_stages = [
        memory_of_stage(
            shape,
            layout,
            model,
            stage,
            num_gpus=num_gpus,
            max_pack_tokens=max_pack_tokens,
            keys_per_token=keys_per_token,
            kernels=kernels,
        )
        for stage in {0, layout.pp - 1}
    ]
    if offload:
        of_stages = [replace(memory, optimizer=0.0) for memory in of_stages]
    return max(of_stages, key=lambda memory: memory.total)


def parameters_of_stage(shape: ModelShape, layout: LayoutConfig, stage: int) -> tuple[float, float]:
    """Parameters on one rank of a pipeline stage: those that all data-parallel ranks hold, and the experts'.

    Expert matrices are sharded over ep, or over tp where ep is 1; other matrices and the embeddings over tp; norms
    and router are replicated.
    """
    layers = -(-shape.num_layers // layout.pp)
    matrices = shape.attention_matrices + shape.qkv_biases + (0 if shape.num_experts else shape.mlp_matrices)
    dense = layers * (matrices / layout.tp + shape.router + shape.norm_vectors)
    embedding = shape.embedding_rows(layout.tp) * shape.hidden_size
    is_first, is_last = stage == 0, stage == layout.pp - 1
    if is_first or is_last:
        tables = 1 if shape.tied_embeddings else is_first + is_last
        dense += tables * embedding
    if is_last:
        dense += shape.hidden_size
    sharded = layout.ep if layout.ep > 1 else layout.tp
    return dense, layers * shape.num_experts * shape.mlp_matrices / sharded


def layer_bytes_per_token(
    shape: ModelShape,
    layout: LayoutConfig,
    model: ModelConfig,
    kernels: Kernels = GPU,
    *,
    keys_per_token: float = 1.0,
) -> float:
    """Bytes that one layer keeps for its backward pass, per token of this rank's T / cp; with full recompute,
    while it is differentiated.

    In values of the weights' width, h the hidden size, d a head's, q and g the widths of all queries and of all keys
    and values:

        norms       2 * 2h        input and output (the input of the following projection)
        rotary      4d            sine and cosine, for queries and for keys
        attention   (q + g) + q + g/2 + q      QKV as projected (the values lie in it), rotated q and k, output
        q, k norms  q             the queries' input
        MLP         5f            gate and up (2f), silu(gate), up, their product
        experts     k (h + 6f)    of each of the token's k copies its input, 5f, and the product with its probability

    and 4 bytes per norm and per head of attention and of the query and key norms. Tensor parallelism divides all but
    rotary, and norms only with sequence parallelism. Selective recompute leaves out what the attention kernel adds.
    Where prompts are shared, keys and values are kept once for each response that sees them. Context parallelism
    keeps those that the rank's two pieces of the pack see: of a trajectory as long as the pack the first r + 1 and
    2 cp - r of 2 cp pieces, together (1 + 1 / (2 cp)) T.
    """
    width = width_of(model)
    hidden = shape.hidden_size / (layout.tp if layout.sequence_parallel else 1)
    query, both = shape.query_size / layout.tp, shape.key_value_size / layout.tp
    heads, groups = shape.num_attention_heads / layout.tp, shape.num_query_groups / layout.tp
    norms = 2 * ((width + kernels.norm_width(width)) * hidden + 4)
    keeps_attention = model.recompute != "selective"
    gathers = (layout.cp > 1 or keys_per_token > 1) and keeps_attention
    values = 4 * shape.head_dim + query + query
    seen = layout.cp + 0.5 if layout.cp > 1 else 1.0
    values += both * seen * keys_per_token if gathers else both / 2
    if shape.qk_norm or not gathers:
        values += query + both
    statistics = 0.0
    if keeps_attention:
        statistics += 4 * heads
        values += 0 if kernels.joined_attention else query
    if shape.qk_norm:
        norms += kernels.norm_width(width) * query + 4 * (heads + groups)
        # The keys' input is a part of QKV as projected, but for its copy in fp32.
        norms += 0 if kernels.fused_norm else (4 if width == 4 else 8) * both / 2
    return norms + width * values + statistics + _mlp_bytes(shape, layout, width)


def width_of(model: ModelConfig) -> int:
    """Bytes of a weight and of an activation."""
    return 2 if model.weight_precision == "bf16" else 4


def _mlp_bytes(shape: ModelShape, layout: LayoutConfig, width: int) -> float:
    if not shape.num_experts:
        return width * 5 * shape.ffn_hidden_size / layout.tp
    own = layout.tp if layout.sequence_parallel else 1
    # Chosen experts and their probabilities, and the same as tables over all experts.
    routing = (20 * shape.experts_per_token + 5 * shape.num_experts) / own
    if layout.ep > 1:
        # Whole experts, for this rank's tokens or as many of others.
        copy = (width * (shape.hidden_size + 6 * shape.ffn_hidden_size) + 4) / own
    else:
        copy = width * (shape.hidden_size + 6 * shape.ffn_hidden_size / layout.tp) + 4
    return routing + shape.experts_per_token * copy


def passes_in_flight(layout: LayoutConfig, stage: int) -> int:
    """Chunks of the model times packs whose activations a stage keeps at once: 1F1B, or interleaved (Korthikanti et al.
    2022)."""
    if layout.vpp == 1:
        return layout.pp - stage
    return 2 * (layout.pp - stage - 1) + (layout.vpp - 1) * layout.pp + 1


def memory_of_stage(
    shape: ModelShape,
    layout: LayoutConfig,
    model: ModelConfig,
    stage: int,
    *,
    num_gpus: int,
    max_pack_tokens: int,
    keys_per_token: float = 1.0,
    kernels: Kernels = GPU,
) -> Memory:
    """As `memory_per_rank`, on the ranks of one pipeline stage."""
    width = width_of(model)
    dense, experts = parameters_of_stage(shape, layout, stage)
    per_stage = num_gpus // layout.pp
    states = 12 if model.weight_precision == "bf16" else 8
    optimizer = states * (dense * layout.tp + experts * (layout.ep if layout.ep > 1 else layout.tp)) / per_stage
    tokens = max_pack_tokens / layout.cp
    hidden = shape.hidden_size / (layout.tp if layout.sequence_parallel else 1)
    layer = layer_bytes_per_token(shape, layout, model, kernels, keys_per_token=keys_per_token) * tokens
    passes, is_last = passes_in_flight(layout, stage), stage == layout.pp - 1
    in_flight = passes * -(-shape.num_layers // layout.pp) / layout.vpp
    if model.recompute == "full":
        # Each layer's input, and the rotary table once a pack.
        activations = (in_flight * width * hidden + passes / layout.vpp * 4 * shape.head_dim) * tokens
    else:
        activations = in_flight * layer
    # What was sent to the next stage stays until its gradient comes back.
    activations += (passes - is_last) * width * hidden * tokens
    working = _working_bytes_per_token(shape, layout, width) * tokens
    working += layer if model.recompute == "full" else 0.0
    if stage == 0:
        activations += 8 * tokens
    logits = 0.0
    if is_last:
        activations += tokens * (kernels.norm_width(width) * hidden + 4)
        logits = _head(shape, layout, model, tokens)
    weights = width * (dense + experts)
    if model.precision == "fp8":
        # Between the packs of a step each matrix of the layers lies there in fp8 as well, and transposed.
        matrices = shape.attention_matrices + (0 if shape.num_experts else shape.mlp_matrices)
        weights += 2 * (-(-shape.num_layers // layout.pp) * matrices / layout.tp + experts)
    return Memory(weights, 4 * (dense + experts), optimizer, activations, working, logits)


def head_bytes_per_row(shape: ModelShape, model: ModelConfig) -> float:
    """What the head keeps of a response token: its hidden state, place, target, log Z and entropy."""
    return width_of(model) * shape.hidden_size + 24


def _head(shape: ModelShape, layout: LayoutConfig, model: ModelConfig, tokens: float) -> float:
    """As if every token were a response token: the blocks, rows kept, and in the backward pass the rows' gradient in
    fp32, that of the gathered hidden states, and that of the output weights."""
    width = width_of(model)
    blocks = model.head_chunk_mebibytes * 2**20 * (2 if width == 4 else 2.5)
    rows = head_bytes_per_row(shape, model) + 4 * shape.hidden_size + width * shape.hidden_size
    weight = width * shape.embedding_rows(layout.tp) * shape.hidden_size
    return blocks + rows * tokens + weight


def _working_bytes_per_token(shape: ModelShape, layout: LayoutConfig, width: int) -> float:
    """Gradients of the widest tensors of a layer: of gate and up (2 f), and of two hidden states."""
    if not shape.num_experts:
        return width * (2 * shape.ffn_hidden_size / layout.tp + 2 * shape.hidden_size)
    # The token's copies sent to the experts and back, and their gradients; one expert at a time works beside that.
    own = layout.tp if layout.sequence_parallel and layout.ep > 1 else 1
    return width * (2 * shape.experts_per_token / own + 2) * shape.hidden_size
