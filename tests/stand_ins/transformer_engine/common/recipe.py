"""How tensors are rounded to fp8."""

from dataclasses import dataclass
from enum import Enum


class Format(Enum):
    E4M3 = "e4m3"
    HYBRID = "e4m3, and e5m2 for gradients"


@dataclass
class Float8CurrentScaling:
    """Scales from the tensor at hand."""

    use_power_2_scales: bool = False
    fp8_format: Format = Format.HYBRID
    fp8_dpa: bool = False
    fp8_mha: bool = False


class DelayedScaling:
    """Derived from by Megatron; not offered here."""
