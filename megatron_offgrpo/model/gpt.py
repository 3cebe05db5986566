"""The student: Megatron's transformer over packed trajectory groups, with the lean log-prob head."""

from megatron_offgrpo.parallel import portable  # isort: skip

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.transformer_block import TransformerBlock, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_offgrpo.config import LayoutConfig, ModelConfig
from megatron_offgrpo.errors import ConfigError
from megatron_offgrpo.model.hf_config import Architecture, rope_inverse_frequencies
from megatron_offgrpo.model.layers import block_of, require_layer
from megatron_offgrpo.model.packing import ModelInput
from megatron_offgrpo.model.router import BalancedRouter
from megatron_offgrpo.model.shape import shape_of
from megatron_offgrpo.parallel.logprob import chunk_rows_for, vocab_parallel_logprob
from megatron_offgrpo.planning.divides import check_divides
from megatron_offgrpo.planning.shape import padded_vocab_size


class PackedGPTModel(LanguageModule):
    """Maps a pack to log-prob and entropy of its response tokens; on earlier pipeline stages to hidden states.

    Its modules and their names are those of Megatron's GPTModel, whose checkpoints it reads and writes.
    """

    model_type = ModelType.encoder_or_decoder

    def __init__(
        self,
        config: TransformerConfig,
        architecture: Architecture,
        head_chunk_mebibytes: int,
        *,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
    ) -> None:
        super().__init__(config)
        self.pre_process, self.post_process, self.vp_stage = pre_process, post_process, vp_stage
        self.share_embeddings_and_output_weights = architecture.tied_embeddings
        self.real_vocab_size = architecture.vocab_size
        self.vocab_size = padded_vocab_size(architecture.vocab_size, config.tensor_model_parallel_size)
        self.chunk_rows = chunk_rows_for(head_chunk_mebibytes, self.vocab_size // config.tensor_model_parallel_size)
        if pre_process:
            # Rotary angles come from explicit positions, see `forward`.
            self.embedding = LanguageModelEmbedding(
                config, self.vocab_size, architecture.max_positions, position_embedding_type="none"
            )
        self.decoder = TransformerBlock(
            config,
            block_of(config, get_num_layers_to_build(config, vp_stage)),
            pre_process=pre_process,
            post_process=post_process,
            vp_stage=vp_stage,
        )
        if post_process:
            self.output_layer = ColumnParallelLinear(
                config.hidden_size,
                self.vocab_size,
                config=config,
                init_method=config.init_method,
                bias=False,
                skip_weight_param_allocation=pre_process and architecture.tied_embeddings,
            )
        if pre_process or post_process:
            self.setup_embeddings_and_output_layer()
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        inverse = rope_inverse_frequencies(architecture).to(device)
        self.register_buffer("inverse_frequencies", inverse, persistent=False)
        self.routers = [module for module in self.modules() if isinstance(module, BalancedRouter)]

    def set_input_tensor(self, input_tensors: list[Tensor | None]) -> None:
        """Takes what the stage before has sent; Megatron's schedule calls it."""
        (hidden,) = input_tensors
        self.decoder.set_input_tensor(hidden)

    def sharded_state_dict(self, prefix: str = "", *arguments: Any, **keywords: Any) -> dict[str, Any]:
        """Megatron's, without a key that GPTModel leaves out as well."""
        state: dict[str, Any] = super().sharded_state_dict(prefix, *arguments, **keywords)
        state.pop(f"{prefix}output_layer._extra_state", None)
        return state

    def forward(self, pack: ModelInput) -> Tensor:
        """[2, R] fp32 log-probs and entropies (nats) on the last stage; [T or T/tp, 1, H] hidden states before it."""
        hidden = self.embedding(input_ids=pack.ids_1T, position_ids=None) if self.pre_process else None
        angles_TD = torch.outer(pack.positions_T.float(), self.inverse_frequencies.float())
        hidden = self.decoder(
            hidden_states=hidden,
            attention_mask=None,
            rotary_pos_emb=torch.cat((angles_TD, angles_TD), dim=-1)[:, None, None, :],
            packed_seq_params=pack.segments,
            padding_mask=self._padding_mask(pack) if self.config.moe_aux_loss_coeff else None,
        )
        if not self.post_process:
            return hidden
        return torch.stack(self._head(hidden, pack))

    def _padding_mask(self, pack: ModelInput) -> Tensor:
        """[1, T or T/tp] bool, False at the rows that the loss sees: they alone count for the routers' balance."""
        mask_1T = torch.ones_like(pack.ids_1T, dtype=torch.bool)
        mask_1T[0, pack.rows_R] = False
        if not self.config.sequence_parallel:
            return mask_1T
        pieces = mask_1T.chunk(self.config.tensor_model_parallel_size, dim=1)
        return pieces[parallel_state.get_tensor_model_parallel_rank()]

    def _head(self, hidden: Tensor, pack: ModelInput) -> tuple[Tensor, Tensor]:
        # Either mapping sums the hidden states' gradient over the tensor-parallel group, once.
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True)
            hidden_RH = hidden[:, 0].index_select(0, pack.rows_R)
        else:
            hidden_RH = copy_to_tensor_model_parallel_region(hidden[:, 0].index_select(0, pack.rows_R))
        weight = (
            self.shared_embedding_or_output_weight()
            if self.share_embeddings_and_output_weights
            else self.output_layer.weight
        )
        return vocab_parallel_logprob(
            hidden_RH,
            weight,
            pack.targets_R,
            first_column=parallel_state.get_tensor_model_parallel_rank() * weight.shape[0],
            vocab_size=self.real_vocab_size,
            chunk_rows=self.chunk_rows,
            group=parallel_state.get_tensor_model_parallel_group(),
        )


def transformer_config(architecture: Architecture, layout: LayoutConfig, model: ModelConfig) -> TransformerConfig:
    """Megatron's configuration of this architecture in this layout.

    Raises:
        ConfigError: the architecture does not divide over the layout, or has no router to freeze or balance, or fp8
            cannot multiply its matrices.
    """
    check_divides(shape_of(architecture), layout, model)
    _check_router(architecture, model)
    dtype = torch.bfloat16 if model.weight_precision == "bf16" else torch.float32
    experts = architecture.experts
    mixture: dict[str, Any] = {}
    if experts is not None:
        mixture = {
            "num_moe_experts": experts.count,
            "moe_router_topk": experts.active,
            "moe_ffn_hidden_size": experts.ffn_hidden_size,
            # softmax then top-k keeps raw probabilities; top-k then softmax normalises them.
            "moe_router_pre_softmax": not experts.normalise_top_k,
            "moe_router_dtype": "fp32",
            "moe_router_load_balancing_type": "aux_loss" if model.router == "balanced" else "none",
            "moe_aux_loss_coeff": model.balance_coefficient if model.router == "balanced" else 0.0,
        }
    return TransformerConfig(
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=architecture.ffn_hidden_size,
        num_attention_heads=architecture.num_heads,
        num_query_groups=architecture.num_kv_heads,
        kv_channels=architecture.head_dim,
        layernorm_epsilon=architecture.norm_epsilon,
        init_method_std=architecture.initializer_range,
        normalization="RMSNorm",
        qk_layernorm=architecture.qk_norm,
        add_qkv_bias=architecture.qkv_bias,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=model.weight_precision == "bf16",
        transformer_impl="local" if model.layer == "portable" else "transformer_engine",
        fp8="hybrid" if model.precision == "fp8" else None,
        # Scales come from the tensor at hand: without a history there is nothing that a resumed run would miss.
        fp8_recipe="tensorwise",
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=1 if layout.ep > 1 else None,
        sequence_parallel=layout.sequence_parallel,
        use_cpu_initialization=portable.needed(),
        # Interleaved stages of two pipeline ranks send both ways between the same pair at once; Megatron keeps those
        # messages apart in this mode only, else they arrive exchanged.
        overlap_p2p_comm=layout.vpp > 1,
        batch_p2p_comm=layout.vpp == 1,
        # Packs differ in length, so pipeline stages tell each other the shape.
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",
        # The plan's weights are the whole normalisation; see training/step.py.
        calculate_per_token_loss=True,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
        cuda_graph_modules=[],
        recompute_granularity=None if model.recompute == "none" else model.recompute,
        recompute_method="uniform" if model.recompute == "full" else None,
        recompute_num_layers=1 if model.recompute == "full" else None,
        **mixture,
    )


def build_model(architecture: Architecture, layout: LayoutConfig, model: ModelConfig) -> list[PackedGPTModel]:
    """This process's model chunks (one, or `layout.vpp` of them), with random weights, on its device.

    Raises:
        ConfigError: as `transformer_config`, or this process cannot run the layer.
    """
    require_layer(model)
    config = transformer_config(architecture, layout, model)
    chunks = []
    for stage in range(layout.vpp):
        vp_stage = stage if layout.vpp > 1 else None
        chunk = PackedGPTModel(
            config,
            architecture,
            model.head_chunk_mebibytes,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
            vp_stage=vp_stage,
        )
        if model.router == "frozen":
            for router in chunk.routers:
                router.requires_grad_(False)
        chunks.append(chunk if portable.needed() else chunk.cuda())
    return chunks


def _check_router(architecture: Architecture, model: ModelConfig) -> None:
    if model.router != "trained" and architecture.experts is None:
        raise ConfigError("a dense model has no router", where="model.router", expected="trained", got=model.router)
    if model.router == "balanced" and model.balance_coefficient <= 0:
        raise ConfigError(
            "the load-balancing loss has no weight",
            where="model.balance_coefficient",
            expected="above 0",
            got=model.balance_coefficient,
            remedy="model.router=trained leaves it out",
        )
