"""The student in training: model chunks under data parallelism, and their optimizer."""

from megatron_offgrpo.parallel import portable  # noqa: F401  # isort: skip

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_offgrpo.config import OptimizerConfig, RunConfig
from megatron_offgrpo.errors import ConfigError
from megatron_offgrpo.model.gpt import PackedGPTModel, build_model
from megatron_offgrpo.model.hf_config import Architecture
from megatron_offgrpo.training.batch import Batch

LossFunction = Callable[[Batch, Tensor], tuple[Tensor, Any]]
"""(batch, [2, R] log-probs and entropies) -> (scalar loss, what the caller wants back)."""


@dataclass(frozen=True)
class Student:
    """Model chunks (one, or one per virtual pipeline stage) with gradient buffers, and the optimizer over them."""

    architecture: Architecture
    models: list[PackedGPTModel]
    wrapped: list[Any]
    """The same chunks as `DistributedDataParallel`."""
    optimizer: Any

    def zero_grad(self) -> None:
        """Clears the gradient buffers and the optimizer's gradients."""
        for chunk in self.wrapped:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

    def balance_over(self, num_tokens: float) -> None:
        """Tells the routers of a mixture of experts how many response tokens the step has on all ranks together."""
        for model in self.models:
            for router in model.routers:
                router.tokens_of_step = num_tokens

    def close(self) -> None:
        """Lets go of the model: Megatron's gradient hooks refer to it in circles that Python's collector cannot see."""
        for chunk in self.wrapped:
            chunk.grad_accs.clear()
        config = self.models[0].config
        config.grad_scale_func = config.no_sync_func = config.finalize_model_grads_func = None

    def gradients_are_finite(self) -> bool:
        """True where no gradient of this process is NaN or inf."""
        for chunk in self.wrapped:
            for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
                if not torch.isfinite(buffer.grad_data).all():
                    return False
        return True


def build_student(architecture: Architecture, run: RunConfig, *, distributed_optimizer: bool = True) -> Student:
    """A student with random weights in the run's layout and precision.

    Raises:
        ConfigError: the model does not divide over the layout, or the optimizer cannot be offloaded.
    """
    if run.optimizer.cpu_offload:
        _check_offload(run)
    models = build_model(architecture, run.layout, run.model)
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=distributed_optimizer,
        # Overlap pays where communication has a stream of its own.
        overlap_grad_reduce=torch.cuda.is_available() and run.layout.pp == 1,
        # Megatron's default grows with the number of ranks, and sharded checkpoints must find the same buckets again.
        bucket_size=40_000_000,
    )
    wrapped = [
        DistributedDataParallel(model.config, ddp_config, model, disable_bucketing=number > 0)
        for number, model in enumerate(models)
    ]
    optimizer = get_megatron_optimizer(_optimizer_config(run, distributed_optimizer), wrapped)
    config = models[0].config
    config.grad_scale_func = optimizer.scale_loss
    config.no_sync_func = wrapped[0].no_sync if len(wrapped) == 1 else [chunk.no_sync for chunk in wrapped]
    config.finalize_model_grads_func = _finalize
    return Student(architecture, models, wrapped, optimizer)


def _finalize(models: list[Any], num_tokens: Tensor | None = None, **keywords: Any) -> None:
    """Megatron's reduction of gradients over the layout, without its division by a token count.

    The plan's weights are the whole normalisation. With `calculate_per_token_loss` the schedule neither multiplies
    nor divides the loss, DDP sums over data- and context-parallel ranks, and leaving the count out keeps the plain sum.
    """
    finalize_model_grads(models, None, **keywords)


def _optimizer_config(run: RunConfig, distributed_optimizer: bool) -> MegatronOptimizerConfig:
    settings = run.optimizer
    bf16 = run.model.weight_precision == "bf16"
    return MegatronOptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        min_lr=settings.min_lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.beta1,
        adam_beta2=settings.beta2,
        adam_eps=settings.eps,
        clip_grad=settings.clip_grad,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=distributed_optimizer,
        optimizer_cpu_offload=settings.cpu_offload,
        # A part would be possible, but what stays on the GPU takes a wrong step count from a checkpoint.
        optimizer_offload_fraction=float(settings.cpu_offload),
        overlap_cpu_optimizer_d2h_h2d=settings.cpu_offload,
        # Only in this form are the master weights, too, on the CPU, and right after the weights are loaded.
        use_precision_aware_optimizer=settings.cpu_offload,
    )


def _check_offload(run: RunConfig) -> None:
    where = "optimizer.cpu_offload"
    if not torch.cuda.is_available():
        raise ConfigError("there is no GPU whose memory this would save", where=where, expected="false", got=True)
    if run.model.weight_precision != "bf16":
        raise ConfigError(
            "needs weights in bf16", where=where, expected="model.precision bf16", got=run.model.precision
        )
    if run.checkpoint.format != "reshardable":
        raise ConfigError(
            "Megatron-Core does not load an offloaded optimizer from a sharded checkpoint",
            where=where,
            expected="checkpoint.format reshardable",
            got=run.checkpoint.format,
            remedy="--set checkpoint.format=reshardable",
        )


def learning_rate(step: int, num_steps: int, settings: OptimizerConfig) -> float:
    """Learning rate of step 0 .. num_steps-1: linear warm-up, then constant, linear or cosine decay to `min_lr`.

    A function of the step alone, so that a resumed run needs no scheduler state.
    """
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return settings.lr
    done = (step - settings.warmup_steps) / max(1, num_steps - settings.warmup_steps)
    left = 1 - done if settings.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return settings.min_lr + (settings.lr - settings.min_lr) * left


def run_packs(
    chunks: list[Any],
    make_batches: Callable[[], Iterable[Batch]],
    num_batches: int,
    loss_function: LossFunction,
    *,
    max_pack_tokens: int,
    forward_only: bool = False,
) -> list[Any]:
    """Runs Megatron's schedule over this rank's packs, one pack a micro-batch.

    Args:
        chunks: model chunks, wrapped for training.
        make_batches: called once per chunk, since every virtual stage walks through all packs.

    Returns:
        What `loss_function` gave back for each pack; empty on all but the last pipeline stage.
    """

    def forward_step(batches: Iterator[Batch], chunk: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
        batch = next(batches)

        def loss_of(output_2R: Tensor) -> tuple[Tensor, Tensor, Any]:
            loss, result = loss_function(batch, output_2R)
            return loss, torch.zeros((), dtype=torch.int, device=loss.device), result

        return chunk(batch.model_input), loss_of

    iterators = [iter(make_batches()) for _ in chunks]
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=num_batches,
        seq_length=max_pack_tokens,
        micro_batch_size=1,
        forward_only=forward_only,
    )
