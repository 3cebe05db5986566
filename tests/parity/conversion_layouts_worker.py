"""What each rank does in the tests of trained checkpoints: loads, fills padding, moves master weights, saves."""

from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state

from megatron_offgrpo.artifacts import Manifest
from megatron_offgrpo.config import LayoutConfig, ModelConfig, OptimizerConfig, RunConfig
from megatron_offgrpo.model.hf_config import read_architecture
from megatron_offgrpo.parallel import runtime
from megatron_offgrpo.training import checkpoint
from megatron_offgrpo.training.student import Student, build_student
from recipes.objectives import released

KEYS = {
    "stacked": None,
    "per_layer": {"non_homogeneous_layers": True},
    "singleton": {"singleton_local_shards": True},
}


def write_checkpoints(cases: list[dict], step: float) -> None:
    """Writes each case (model folder, output, layout, precision, keys) as iteration 10."""
    for case in cases:
        layout = LayoutConfig(**case["layout"])
        place = runtime.start(layout, seed=0)
        run = RunConfig(
            name="conversion",
            objective=released(),
            layout=layout,
            model=ModelConfig(precision=case["precision"], head_chunk_mebibytes=1),
            optimizer=OptimizerConfig(lr=0.0),
        )
        student = build_student(read_architecture(Path(case["model"]) / "hf"), run)
        checkpoint.load_weights(student, Path(case["model"]) / "megatron" / "release")
        _fill_padding(student)
        # A step with learning rate 0 makes the optimizer's state and changes nothing.
        student.zero_grad()
        student.optimizer.step()
        output = Path(case["output"])
        if case["keys"] == "stacked":
            if case["precision"] == "bf16":
                _move_masters(student.optimizer, step)
            manifest = Manifest(kind="checkpoint", fingerprint="trained", inputs={})
            writer = checkpoint.CheckpointWriter(output, place, keep=0, asynchronous=False)
            writer.save(student, 10, manifest)
        else:
            _save_model(student, output, KEYS[case["keys"]])
    runtime.stop()


def _fill_padding(student: Student) -> None:
    """Sevens in the rows past the vocabulary, which would show in an export."""
    for model in student.models:
        weights = [model.embedding.word_embeddings.weight] if model.pre_process else []
        if model.post_process and not model.share_embeddings_and_output_weights:
            weights.append(model.output_layer.weight)
        for weight in weights:
            first = parallel_state.get_tensor_model_parallel_rank() * weight.shape[0]
            weight.data[max(0, model.real_vocab_size - first) :] = 7.0


def _move_masters(optimizer: Any, step: float) -> None:
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        for group in part.shard_fp32_from_float16_groups:
            for parameter in group:
                parameter.data.add_(step)


def _save_model(student: Student, output: Path, metadata: dict[str, bool] | None) -> None:
    folder = output / "iter_0000010"
    if dist.get_rank() == 0:
        folder.mkdir(parents=True)
        (output / "latest_checkpointed_iteration.txt").write_text("10")
    dist.barrier()
    (model,) = student.models
    state = {k: v for k, v in model.sharded_state_dict(metadata=metadata).items() if not k.endswith("_extra_state")}
    dist_checkpointing.save({"model": state}, str(folder))
