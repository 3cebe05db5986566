"""Named hardware: cards with their memory and their peak rate of bf16 matrix products without sparsity."""

import re
from dataclasses import dataclass

from megatron_offgrpo.errors import ConfigError
from megatron_offgrpo.planning.memory import GIB

USABLE = 0.9
"""Share of a card's memory that a plan may take; CUDA's context, NCCL's buffers and fragmentation take the rest."""
GPUS_PER_NODE = 8
CARDS = {
    "A100-40GB": (39.4, 312.0),
    "A100": (79.2, 312.0),
    "H100": (79.1, 989.4),
    "H200": (139.8, 989.4),
    "B200": (178.0, 2250.0),
    "L40S": (44.4, 362.0),
}
"""GiB that CUDA reports, and 10^12 FLOP/s in bf16 (NVIDIA's data sheets, SXM where there is a choice)."""
DEVICES = {
    "NVIDIA A100-SXM4-40GB": "A100-40GB",
    "NVIDIA A100-PCIE-40GB": "A100-40GB",
    "NVIDIA A100-SXM4-80GB": "A100",
    "NVIDIA A100 80GB PCIe": "A100",
    "NVIDIA H100 80GB HBM3": "H100",
    "NVIDIA H200": "H200",
    "NVIDIA B200": "B200",
    "NVIDIA L40S": "L40S",
}
"""Names that CUDA reports for these cards. Other variants (H100 PCIe, MIG slices) have other rates and are left out."""


def peak_tflops_of(device_name: str) -> float | None:
    """10^12 FLOP/s in bf16 of the GPU that CUDA calls so; None where its rate is not known."""
    return CARDS[DEVICES[device_name]][1] if device_name in DEVICES else None


@dataclass(frozen=True)
class Hardware:
    """A number of equal GPUs."""

    card: str
    num_gpus: int
    memory_bytes: float
    """Of one GPU."""
    peak_tflops: float | None
    """10^12 FLOP/s of one GPU; None where only the memory is named."""

    @property
    def usable_bytes(self) -> float:
        return USABLE * self.memory_bytes

    @staticmethod
    def parse(text: str) -> "Hardware":
        """`8xH100`, or `8x80GB` where only the memory matters.

        Raises:
            ConfigError: not COUNTxCARD, or a card that is not in the table.
        """
        found = re.fullmatch(r"([1-9]\d*)x(.+)", text)
        expected = f"COUNTxCARD with one of {', '.join(CARDS)}, or COUNTxMEMORY such as 8x80GB"
        if not found:
            raise ConfigError("not a number of cards", where="--hardware", expected=expected, got=text)
        count, card = int(found[1]), found[2]
        memory = re.fullmatch(r"([1-9]\d*)GB", card)
        if memory:
            # Cards report about a hundredth less than their name says.
            return Hardware(card, count, 0.989 * int(memory[1]) * GIB, None)
        if card not in CARDS:
            raise ConfigError("unknown card", where="--hardware", expected=expected, got=card)
        gib, tflops = CARDS[card]
        return Hardware(card, count, gib * GIB, tflops)
