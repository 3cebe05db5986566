"""Tests every node of an allocation before a run: packages, devices, collectives within and between nodes, storage.

Each measurement is a process of its own under a time limit, so that a hanging device or network is a result, too.
"""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from megatron_offgrpo.artifacts import write_json_atomically

LIMIT_SECONDS = 100
"""For each collective. Good nodes take one or two minutes in all, mostly to start Python from shared storage."""
STORAGE_MEBIBYTES = 256
SLOW = 0.5
"""A node below this share of the median of all nodes is called slow."""


@dataclass
class NodeResult:
    """What was found on one node; `reasons` is empty for a good one."""

    node: str
    within_gbps: float | None = None
    """Bus bandwidth of an all-reduce over the node's own processes, 10^9 bytes per second."""
    links: dict[str, float | str] = field(default_factory=dict)
    """Number of a neighbouring node -> the same with it, or what went wrong."""
    storage_mbps: float | None = None
    """Write, then read back from shared storage, 10^6 bytes per second; the slower of both."""
    doctor: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)

    @property
    def between_gbps(self) -> float | None:
        """The better link: a bad neighbour spoils only one."""
        return max((rate for rate in self.links.values() if isinstance(rate, float)), default=None)


def check_this_node(folder: Path) -> None:
    """Measures this node and writes `FOLDER/NODE.json`; as task I of N under srun also the links to its neighbours."""
    node = os.environ.get("SLURMD_NODENAME", socket.gethostname())
    number, nodes = int(os.environ.get("SLURM_PROCID", "0")), int(os.environ.get("SLURM_NTASKS", "1"))
    folder.mkdir(parents=True, exist_ok=True)
    result = NodeResult(node)
    # The next node finds this one here: each pair meets at a port of its lower member.
    port = _free_port()
    write_json_atomically(folder / f"address-{number}.json", [node, port], durable=False)
    result.storage_mbps = _storage(folder / f"storage-{node}.bin", result.reasons)
    result.doctor = _doctor(result.reasons)
    result.within_gbps = _within(result.reasons)
    if nodes > 1:
        result.links = _links(folder, number, nodes)
    # Not synced: what was found must get through where syncing fails.
    write_json_atomically(folder / f"{node}.json", asdict(result), durable=False)


def _storage(path: Path, reasons: list[str]) -> float | None:
    block = os.urandom(1 << 20)
    try:
        started = time.perf_counter()
        with path.open("wb") as file:
            for _ in range(STORAGE_MEBIBYTES):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            written = time.perf_counter() - started
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        started = time.perf_counter()
        with path.open("rb") as file:
            equal = all(file.read(1 << 20) == block for _ in range(STORAGE_MEBIBYTES))
        taken = max(written, time.perf_counter() - started)
    except OSError as error:
        reasons.append(f"storage: {error}")
        return None
    finally:
        path.unlink(missing_ok=True)
    if not equal:
        reasons.append("storage: read back other bytes than were written")
    return STORAGE_MEBIBYTES * 1.048576 / taken


def _doctor(reasons: list[str]) -> list[str]:
    from megatron_offgrpo import doctor

    lines = doctor.lines()
    reasons += [f"doctor: {' '.join(line.split())}" for line in lines if "MISSING" in line]
    return lines


def _within(reasons: list[str]) -> float | None:
    import torch

    count = torch.cuda.device_count() or 2
    expected = os.environ.get("SLURM_GPUS_ON_NODE")
    if expected and torch.cuda.is_available() and int(expected) != count:
        reasons.append(f"GPUs: Slurm gave {expected}, torch sees {count}")
    master = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    ranks = [{**master, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)} for rank in range(count)]
    return _all_reduce(ranks, "within the node", reasons)


def _links(folder: Path, number: int, nodes: int) -> dict[str, float | str]:
    """All-reduce with one neighbour after the other."""
    links: dict[str, float | str] = {}
    for first in _pairs(number, nodes):
        other = str(first + 1 if first == number else first)
        meeting = _address(folder, first)
        if meeting is None:
            links[other] = f"node {first} never came"
            continue
        rank = {"MASTER_ADDR": meeting[0], "MASTER_PORT": str(meeting[1]), "RANK": str(number - first)}
        complaints: list[str] = []
        rate = _all_reduce([{**rank, "LOCAL_RANK": "0", "WORLD_SIZE": "2"}], f"with node {other}", complaints)
        links[other] = complaints[0] if rate is None else rate
    return links


def _pairs(number: int, nodes: int) -> list[int]:
    """The lower members of this node's pairs: all even pairs meet first, then all odd ones, none waits for another."""
    pairs = [first for first in (number - 1, number) if 0 <= first < nodes - 1]
    return sorted(pairs, key=lambda first: first % 2)


def _address(folder: Path, number: int) -> tuple[str, int] | None:
    path = folder / f"address-{number}.json"
    deadline = time.monotonic() + LIMIT_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            return None
        time.sleep(0.2)
    address, port = json.loads(path.read_text(encoding="utf-8"))
    return str(address), int(port)


def _all_reduce(ranks: Sequence[dict[str, str]], what: str, reasons: list[str]) -> float | None:
    """Runs these ranks of an all-reduce, one process each; the rate that the first of them measured."""
    command = [sys.executable, "-W", "ignore", "-m", "megatron_offgrpo.node_check"]
    processes = [
        subprocess.Popen(command, env={**os.environ, **rank}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank in ranks
    ]
    rates, deadline = [], time.monotonic() + LIMIT_SECONDS
    try:
        for process in processes:
            out, errors = process.communicate(timeout=max(1.0, deadline - time.monotonic()))
            if process.returncode:
                last = errors.strip().splitlines()[-1:] or [f"status {process.returncode}"]
                reasons.append(f"all-reduce {what}: {last[0][:120]}")
                return None
            rates.append(float(out.split()[-1]))
    except subprocess.TimeoutExpired:
        reasons.append(f"all-reduce {what}: no answer within {LIMIT_SECONDS} s")
        return None
    finally:
        for process in processes:
            process.kill()
    return rates[0]


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])


def all_reduce_rank() -> float:
    """One rank: bus bandwidth of a summed tensor, 2 (N-1)/N bytes/second as in nccl-tests; checks the sum.

    Returns:
        10^9 bytes per second.
    """
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    has_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if has_gpu else torch.device("cpu")
    if has_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if has_gpu else "gloo", timeout=timedelta(seconds=LIMIT_SECONDS))
    world, rounds = dist.get_world_size(), 20 if has_gpu else 3
    values = torch.ones((256 if has_gpu else 4) << 18, device=device)
    for timed in (False, True):
        if has_gpu:
            torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(rounds):
            values.fill_(1.0)
            dist.all_reduce(values)
        if has_gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        if timed and not bool((values == world).all()):
            raise ValueError("wrong sum: a device or the network alters values")
    dist.destroy_process_group()
    return rounds * values.numel() * 4 * 2 * (world - 1) / world / seconds / 1e9


def read_results(folder: Path, nodes: Sequence[str]) -> list[NodeResult]:
    """The results of these nodes; a node that wrote none, or is slow beside the others, gets a reason."""
    results = []
    for node in nodes:
        path = folder / f"{node}.json"
        if path.exists():
            results.append(NodeResult(**json.loads(path.read_text(encoding="utf-8"))))
        else:
            results.append(NodeResult(node, reasons=["no result: the check did not run or did not end"]))
    _judge_speed(results)
    usual = max((tuple(r.doctor) for r in results), key=[tuple(r.doctor) for r in results].count, default=())
    for result in results:
        if result.doctor and tuple(result.doctor) != usual:
            odd = next((line for line in result.doctor if line not in usual), "a line is missing")
            result.reasons.append(f"doctor: unlike the other nodes: {' '.join(odd.split())}")
    _judge_links(results)
    return results


def _judge_links(results: Sequence[NodeResult]) -> None:
    """A node without one good link is bad, unless all its neighbours are bad in themselves."""
    faulty = [bool(result.reasons) for result in results]
    for result in results:
        broken = {int(other): link for other, link in result.links.items() if isinstance(link, str)}
        if broken and len(broken) == len(result.links) and not all(faulty[other] for other in broken):
            result.reasons += broken.values()


def _judge_speed(results: Sequence[NodeResult]) -> None:
    for name, label in (("within_gbps", "all-reduce"), ("between_gbps", "network"), ("storage_mbps", "storage")):
        known = sorted(value for result in results if (value := getattr(result, name)) is not None)
        for result in results:
            value = getattr(result, name)
            if value is not None and len(known) > 2 and value < SLOW * known[len(known) // 2]:
                result.reasons.append(f"{label}: {value:.3g}, median of the nodes {known[len(known) // 2]:.3g}")


def table_lines(results: Sequence[NodeResult]) -> list[str]:
    """Node, verdict, bandwidths, storage and reasons; last, what to pass to sbatch."""
    width = max([4, *(len(result.node) for result in results)]) + 2
    lines = [f"{'node':<{width}}{'':<5}{'within GB/s':>12}{'between GB/s':>14}{'storage MB/s':>14}  reason"]
    for result in results:
        numbers = [(result.within_gbps, 12), (result.between_gbps, 14), (result.storage_mbps, 14)]
        cells = "".join(f"{'-' if value is None else f'{value:.3g}':>{wide}}" for value, wide in numbers)
        verdict = "bad" if result.reasons else "ok"
        lines.append(f"{result.node:<{width}}{verdict:<5}{cells}  {'; '.join(result.reasons)}".rstrip())
    bad = [result.node for result in results if result.reasons]
    lines.append(f"{len(results) - len(bad)} of {len(results)} nodes are good")
    if bad:
        lines.append(f"leave out the others: sbatch --exclude={','.join(bad)} ...")
    return lines


if __name__ == "__main__":
    print(all_reduce_rank())
