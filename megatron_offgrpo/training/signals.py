"""SIGTERM and SIGUSR1 ask a run to save after the step at hand and to exit with status 0."""

import signal
from types import FrameType

import torch
import torch.distributed as dist

from megatron_offgrpo.parallel.runtime import Placement


class StopRequest:
    """Remembers a signal; ranks may receive it in different steps, so they agree after each."""

    def __init__(self) -> None:
        self.received = False
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = True

    def agreed(self, place: Placement) -> bool:
        """True on all ranks where any of them was asked to stop."""
        flag = torch.tensor(float(self.received), device=place.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)
