"""200,000 synthetic groups through `offgrpo prepare`: memory does not grow with the number of records."""

import contextlib
import json
import os
import random
import subprocess
import time
from pathlib import Path

import psutil

from tests.system.cli import command, environment
from tests.unit.data.tiny import save_tokenizer

NUM_GROUPS = int(os.environ.get("OFFGRPO_SOAK_GROUPS", "200000"))
BYTES_PER_GROUP = 400
"""Allowed growth: ids, hashes, fates and clusters of the merging, with the copies that sorting makes."""
SLACK_BYTES = 100 << 20


def write_groups(path: Path, number: int) -> None:
    """Groups of two short solutions; every 50th problem is a near-copy of an earlier one."""
    generator = random.Random(0)
    words = [f"word{index}" for index in range(5000)]
    problem = ""
    with path.open("w", encoding="ascii") as file:
        for index in range(number):
            problem = f"{problem} again" if index % 50 == 1 else " ".join(generator.choices(words, k=20))
            solutions = [{"text": f"so {generator.random()}", "reward": generator.randint(0, 1)} for _ in range(2)]
            group = {"group_id": f"g{index}", "problem": problem, "answer": "", "trajectories": solutions}
            file.write(json.dumps(group) + "\n")


def peaks(folder: Path, name: str, number: int) -> tuple[int, int, float]:
    """(peak of the command, peak of a worker, seconds), resident bytes without shared file pages."""
    write_groups(folder / f"{name}.jsonl", number)
    arguments = ["--input", folder / f"{name}.jsonl", "--tokenizer", folder / "tokenizer", "--output", folder / name]
    options = [
        "--label",
        "given",
        "--drop-duplicate-problems",
        "--near-duplicates",
        "0.8",
        "--validation-share",
        "0.01",
    ]
    started = time.perf_counter()
    process = subprocess.Popen(
        command("prepare", *arguments, *options, "--workers", "2"), env=environment(), stdout=subprocess.DEVNULL
    )
    main, worker = 0, 0
    watched = psutil.Process(process.pid)
    while process.poll() is None:
        # It may end between the two looks.
        with contextlib.suppress(psutil.Error):
            main = max(main, _private(watched))
            worker = max([worker, *(_private(child) for child in watched.children(recursive=True))])
        time.sleep(0.2)
    assert process.returncode == 0
    counts = json.loads((folder / name / "manifest.json").read_text())["counts"]
    assert counts["groups"]["total"] + counts["removed"]["near-duplicate problem"] == number
    assert counts["removed"]["near-duplicate problem"] == number // 50
    return main, worker, time.perf_counter() - started


def _private(process: psutil.Process) -> int:
    memory = process.memory_info()
    return int(memory.rss - memory.shared)


def test_memory_is_flat_in_the_number_of_groups(tmp_path):
    save_tokenizer(tmp_path / "tokenizer")
    few, many = NUM_GROUPS // 4, NUM_GROUPS
    main_few, worker_few, _ = peaks(tmp_path, "few", few)
    main_many, worker_many, seconds = peaks(tmp_path, "many", many)
    print(f"\n{many} groups in {seconds:.0f} s; command {main_few >> 20} -> {main_many >> 20} MiB, "
          f"worker {worker_few >> 20} -> {worker_many >> 20} MiB from {few} to {many} groups")  # fmt: skip
    assert worker_many - worker_few < SLACK_BYTES
    assert main_many - main_few < SLACK_BYTES + BYTES_PER_GROUP * (many - few)
