"""Linear layers under tensor and sequence parallelism, alone or behind a norm, in fp8 where it is on."""

import pickle

import torch
from torch import Tensor

from transformer_engine.common.recipe import Float8CurrentScaling
from transformer_engine.pytorch.fp8 import FP8GlobalStateManager, Fp8Product, rounded


class RMSNorm(torch.nn.Module):
    def __init__(
        self,
        normalized_shape=None,
        eps=1e-5,
        sequence_parallel=None,
        params_dtype=None,
        zero_centered_gamma=False,
        hidden_size=None,
        *,
        device=None,
        dtype=None,
        sm_margin=0,
    ):
        super().__init__()
        assert not zero_centered_gamma
        assert (normalized_shape is None) != (hidden_size is None)
        self.eps = eps
        self.weight = torch.nn.Parameter(
            torch.ones(normalized_shape or hidden_size, device=device, dtype=params_dtype or dtype)
        )
        if sequence_parallel is not None:
            self.weight.sequence_parallel = sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        return norm(x, self.weight, self.eps)


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.nn.functional.rms_norm(x.float(), weight.shape, weight.float(), eps).to(x.dtype)


class Linear(torch.nn.Module):
    def __init__(
        self,
        in_features,
        out_features,
        sequence_parallel=False,
        fuse_wgrad_accumulation=False,
        tp_group=None,
        tp_size=1,
        get_rng_state_tracker=None,
        rng_tracker_name=None,
        init_method=None,
        bias=True,
        return_bias=False,
        params_dtype=None,
        parallel_mode=None,
        parameters_split=None,
        device="cuda",
        ub_overlap_ag=False,
        ub_overlap_rs=False,
        ub_overlap_rs_dgrad=False,
        ub_bulk_dgrad=False,
        ub_bulk_wgrad=False,
        ub_name=None,
        delay_wgrad_compute=False,
        symmetric_ar_type=None,
        save_original_input=False,
        name=None,
    ):
        super().__init__()
        assert not any((fuse_wgrad_accumulation, delay_wgrad_compute, parameters_split))
        assert parallel_mode in (None, "column", "row")
        self.tp_group, self.tp_size = tp_group, tp_size if tp_group is None else tp_group.size()
        self.in_features = in_features // (self.tp_size if parallel_mode == "row" else 1)
        self.out_features = out_features // (self.tp_size if parallel_mode == "column" else 1)
        self.parallel_mode = parallel_mode
        self.sequence_parallel = self.tp_size > 1 and sequence_parallel
        self.use_bias, self.return_bias, self.save_original_input = bias, return_bias, save_original_input
        self.fp8, self._weight_fp8 = False, None
        kind = {"device": device, "dtype": params_dtype}
        self._make_norm(kind)
        self.weight = torch.nn.Parameter(torch.empty(self.out_features, self.in_features, **kind))
        init_method(self.weight.data)
        self._mark(self.weight, 1 if parallel_mode == "row" else 0)
        self.bias = torch.nn.Parameter(torch.zeros(self.out_features, **kind)) if bias else torch.empty(0, **kind)
        if bias and parallel_mode == "row":
            self.bias.sequence_parallel = self.sequence_parallel
        elif bias and parallel_mode == "column":
            self._mark(self.bias, 0)

    def _make_norm(self, kind: dict) -> None: ...

    @staticmethod
    def _mark(parameter: Tensor, dim: int) -> None:
        parameter.tensor_model_parallel, parameter.partition_dim, parameter.partition_stride = True, dim, 1

    def forward(self, inp, is_first_microbatch=None, fp8_output=False, fp8_grad=False):
        # Megatron is being imported where this file is.
        from megatron.core.tensor_parallel import mappings

        assert inp.dtype == self.weight.dtype
        if self.parallel_mode == "column" and self.tp_size > 1:
            if self.sequence_parallel:
                inp = mappings.gather_from_sequence_parallel_region(inp, group=self.tp_group)
            else:
                inp = mappings.copy_to_tensor_model_parallel_region(inp, group=self.tp_group)
        out = self._product(inp, is_first_microbatch)
        if self.parallel_mode == "row" and self.tp_size > 1:
            if self.sequence_parallel:
                out = mappings.reduce_scatter_to_sequence_parallel_region(out, group=self.tp_group)
            else:
                out = mappings.reduce_from_tensor_model_parallel_region(out, group=self.tp_group)
        if self.return_bias:
            return out, self.bias
        return out + self.bias if self.use_bias else out

    def _product(self, inp: Tensor, is_first_microbatch: bool | None) -> Tensor:
        self.fp8 = FP8GlobalStateManager.enabled
        if not self.fp8:
            return inp @ self.weight.T
        if is_first_microbatch is None:
            return Fp8Product.apply(inp, self.weight, rounded(self.weight, torch.float8_e4m3fn))
        if is_first_microbatch or self._weight_fp8 is None:
            self._weight_fp8 = rounded(self.weight.detach(), torch.float8_e4m3fn)
        return Fp8Product.apply(inp, self.weight, self._weight_fp8)

    def get_extra_state(self) -> Tensor:
        state = pickle.dumps({"recipe": Float8CurrentScaling(), "extra_fp8_variables": {}}) if self.fp8 else b""
        return torch.frombuffer(bytearray(state), dtype=torch.uint8) if state else torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Tensor | None) -> None:
        assert state is None or state.numel() == 0, "here the real one reads a pickle"


class LayerNormLinear(Linear):
    def __init__(
        self,
        in_features,
        out_features,
        eps=1e-5,
        sequence_parallel=False,
        fuse_wgrad_accumulation=False,
        tp_group=None,
        tp_size=1,
        get_rng_state_tracker=None,
        init_method=None,
        bias=True,
        normalization="LayerNorm",
        return_bias=False,
        params_dtype=None,
        parallel_mode=None,
        return_layernorm_output=False,
        return_layernorm_output_gathered=False,
        parameters_split=None,
        zero_centered_gamma=False,
        device="cuda",
        ub_overlap_ag=False,
        ub_overlap_rs=False,
        ub_overlap_rs_dgrad=False,
        ub_bulk_wgrad=False,
        ub_bulk_dgrad=False,
        ub_name=None,
        delay_wgrad_compute=False,
        symmetric_ar_type=None,
        name=None,
    ):
        assert normalization == "RMSNorm"
        assert not any((return_layernorm_output, zero_centered_gamma))
        super().__init__(
            in_features,
            out_features,
            sequence_parallel,
            fuse_wgrad_accumulation,
            tp_group,
            tp_size,
            init_method=init_method,
            bias=bias,
            return_bias=return_bias,
            params_dtype=params_dtype,
            parallel_mode=parallel_mode,
            parameters_split=parameters_split,
            device=device,
            delay_wgrad_compute=delay_wgrad_compute,
        )
        self.eps, self.normalization = eps, normalization

    def _make_norm(self, kind: dict) -> None:
        self.layer_norm_weight = torch.nn.Parameter(torch.ones(self.in_features, **kind))
        self.layer_norm_weight.sequence_parallel = self.sequence_parallel

    def forward(self, inp, is_first_microbatch=None, fp8_output=False, fp8_grad=False):
        return super().forward(norm(inp, self.layer_norm_weight, self.eps), is_first_microbatch)
