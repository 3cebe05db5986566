"""The transformer layers: portable, or of Transformer Engine's modules; both with a core attention for packed segments.

Parameter names in checkpoints are those of Megatron's Transformer Engine layer, dense and MoE.
"""

from megatron_offgrpo.parallel import portable  # noqa: F401  # isort: skip

import math
from inspect import signature
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.extensions.transformer_engine import HAVE_TE, TENorm
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_te_version, is_te_min_version
from torch import Tensor
from torch.nn.functional import rms_norm, scaled_dot_product_attention

from megatron_offgrpo.config import ModelConfig
from megatron_offgrpo.errors import ConfigError
from megatron_offgrpo.model.packing import MASK_ROWS, PackedSegments
from megatron_offgrpo.model.router import BalancedRouter

TRANSFORMER_ENGINE = "2.12"
"""The oldest release of the containers for which Megatron-Core 0.19 is made."""
FP8_CAPABILITY = (8, 9)


class RMSNorm(torch.nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * g (Zhang & Sennrich 2019, eq. 4); also under sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        # Tells Megatron to sum this weight's gradient over the tensor-parallel group.
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class SegmentAttention(MegatronModule):
    """Causal attention within each segment of a pack and to the prompt it continues: softmax(q k^T / sqrt(d)) v.

    Grouped queries included.
    """

    def __init__(self, config: TransformerConfig, softmax_scale: float | None = None, **_: Any) -> None:
        super().__init__(config=config)
        assert config.kv_channels is not None
        self.scale = softmax_scale or 1 / math.sqrt(config.kv_channels)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        packed_seq_params: PackedSegments,
        **_: Any,
    ) -> Tensor:
        """query [T / cp, 1, heads, d], key and value [T / cp, 1, groups, d] -> [T / cp, 1, heads * d]."""
        segments = packed_seq_params
        query, key, value = (x.squeeze(1) for x in (query, key, value))
        if segments.key_places_K is not None:
            if self.config.context_parallel_size > 1:
                key, value = _gather(key), _gather(value)
            # A prompt that several parts see, or a segment cut by a piece's end, stands there several times.
            key, value = (x.index_select(0, segments.key_places_K) for x in (key, value))
        if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
            out = _varlen_attention(query, key, value, segments, self.scale)
        else:
            out = _attention_by_part(query, key, value, segments, self.scale)
        return out.reshape(out.shape[0], 1, -1)


def _gather(own: Tensor) -> Tensor:
    """[T / cp, groups, d] of each context-parallel rank -> [T, groups, d], laid in a row; gradients are summed."""
    group = parallel_state.get_context_parallel_group()
    return gather_from_sequence_parallel_region(own, tensor_parallel_output_grad=True, group=group)


def _attention_by_part(query: Tensor, key: Tensor, value: Tensor, segments: PackedSegments, scale: float) -> Tensor:
    outputs = []
    grouped = query.shape[1] != key.shape[1]
    lengths = (segments.query_lengths, segments.key_lengths, segments.key_lengths)
    for part in zip(*(x.split(list(of)) for x, of in zip((query, key, value), lengths, strict=True)), strict=True):
        q, k, v = (x.transpose(0, 1)[None] for x in part)
        num_queries, num_keys = q.shape[2], k.shape[2]
        if num_queries == num_keys:
            outs = [scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)]
        else:
            outs = []
            mask = segments.mask(query)
            # In blocks, since with a mask the kernel does not leave out the keys that no query of a block sees.
            for start in range(0, num_queries, MASK_ROWS):
                end = min(start + MASK_ROWS, num_queries)
                seen = num_keys - num_queries + end
                block = (q[:, :, start:end], k[:, :, :seen], v[:, :, :seen])
                hides = mask[start - end :, -seen:]
                # A GPU's kernels want a mask that begins at a round address; on a CPU a copy would be kept a layer.
                hides = hides.contiguous() if hides.is_cuda else hides
                outs.append(scaled_dot_product_attention(*block, attn_mask=hides, scale=scale, enable_gqa=grouped))
        outputs += [out[0].transpose(0, 1) for out in outs]
    return torch.cat(outputs)


def _varlen_attention(query: Tensor, key: Tensor, value: Tensor, segments: PackedSegments, scale: float) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, Any] = {}
    group_size = query.shape[1] // key.shape[1]
    if group_size > 1 and "enable_gqa" in signature(varlen_attn).parameters:
        options["enable_gqa"] = True
    elif group_size > 1:  # torch before 2.12 wants as many heads of keys as of queries
        key, value = (x.repeat_interleave(group_size, dim=1) for x in (key, value))
    out = varlen_attn(
        query,
        key,
        value,
        segments.cu_seqlens_q,
        segments.cu_seqlens_kv,
        segments.max_seqlen_q,
        segments.max_seqlen_kv,
        scale=scale,
        # Causal, aligned at the end of the keys.
        window_size=(-1, 0),
        **options,
    )
    assert isinstance(out, Tensor)
    return out


def block_of(config: TransformerConfig, num_layers: int) -> TransformerBlockSubmodules:
    """The layers of a pipeline stage and the final norm; `config.transformer_impl` says of which kind."""
    if config.transformer_impl == "local":
        return TransformerBlockSubmodules([_portable_layer(config)] * num_layers, RMSNorm)
    return TransformerBlockSubmodules([_transformer_engine_layer(config)] * num_layers, TENorm)


def _portable_layer(config: TransformerConfig) -> ModuleSpec:
    """Megatron's local spec with `RMSNorm` and `SegmentAttention`, under the keys of the other layer's checkpoints."""
    spec = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts,
        moe_grouped_gemm=False,
        qk_layernorm=config.qk_layernorm,
        normalization=config.normalization,
    )
    layer = spec.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
    if config.qk_layernorm:
        layer.self_attention.submodules.q_layernorm = RMSNorm
        layer.self_attention.submodules.k_layernorm = RMSNorm
    # TE fuses the norm into the following linear layer, except before a MoE router.
    layer.sharded_state_dict_keys_map = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
    if config.num_moe_experts is None:
        layer.sharded_state_dict_keys_map["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    return _with_own_parts(spec, config)


def _transformer_engine_layer(config: TransformerConfig) -> ModuleSpec:
    """Megatron's spec of Transformer Engine's linear layers and norms, experts one after the other."""
    spec = get_gpt_layer_with_transformer_engine_spec(
        num_experts=config.num_moe_experts, moe_grouped_gemm=False, qk_layernorm=config.qk_layernorm
    )
    return _with_own_parts(spec, config)


def _with_own_parts(spec: ModuleSpec, config: TransformerConfig) -> ModuleSpec:
    spec.submodules.self_attention.submodules.core_attention = SegmentAttention
    if config.num_moe_experts is not None:
        # A builder of Megatron's MoELayer, with its parts as an argument.
        spec.submodules.mlp.keywords["submodules"].router = BalancedRouter
    return spec


def require_layer(model: ModelConfig) -> None:
    """Refuses Transformer Engine's layer where this process cannot run it, and fp8 in a layer that has none.

    Raises:
        ConfigError: naming the field.
    """
    where, remedy = "model.layer", "--set model.layer=portable"
    if model.layer == "portable":
        if model.precision == "fp8":
            raise ConfigError(
                "only Transformer Engine's layer computes in fp8",
                where="model.precision",
                expected="bf16 or fp32 with model.layer portable",
                got="fp8",
                remedy="--set model.layer=transformer_engine",
            )
        return
    if not torch.cuda.is_available():
        raise ConfigError(
            "Transformer Engine needs a GPU", where=where, expected="portable", got=model.layer, remedy=remedy
        )
    if not HAVE_TE or not is_te_min_version(TRANSFORMER_ENGINE):
        raise ConfigError(
            "there is no Transformer Engine here that Megatron-Core 0.19 works with",
            where=where,
            expected=f"transformer-engine {TRANSFORMER_ENGINE} or later",
            got=get_te_version() if HAVE_TE else "none that can be imported",
            remedy=f"`make install` builds it where nvcc is (docs/parallelism.md), or {remedy}",
        )
    capability = torch.cuda.get_device_capability()
    if model.precision == "fp8" and capability < FP8_CAPABILITY:
        raise ConfigError(
            "this GPU does not compute in fp8",
            where="model.precision",
            expected="compute capability {}.{} or higher (Ada, Hopper, Blackwell)".format(*FP8_CAPABILITY),
            got="{}.{}".format(*capability),
            remedy="--set model.precision=bf16",
        )
