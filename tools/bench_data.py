"""Speed of labelling and of preparing, each beside what bounds it: medians of alternating measurements on one core.

    python -m tools.bench_data --input FILE --tokenizer HF_FOLDER [--groups N] [--repeats R]

Labelling: solutions per second of CPU, graders and parent counted. Preparing: characters per second of the whole stage
(read, tokenise, duplicates of all kinds, store; labels as given) against the tokenizer's own batch call on the texts.
"""

import argparse
import gzip
import json
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_offgrpo.data.grading import GradingPool
from megatron_offgrpo.data.prepare import prepare
from megatron_offgrpo.data.tokenisation import encode, load_tokenizer
from megatron_offgrpo.data_config import FilterConfig, PrepareConfig


def cpu_seconds() -> float:
    """CPU time of this process and of its ended children."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def measured(work: Callable[[], Any]) -> tuple[float, float]:
    """(CPU seconds, wall seconds) of one call."""
    cpu, wall = cpu_seconds(), time.perf_counter()
    work()
    return cpu_seconds() - cpu, time.perf_counter() - wall


def label(items: list[tuple[str, str]]) -> None:
    """Grades everything with one worker, whose start is part of it."""
    with GradingPool(1) as pool:
        pool.grade(items)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, required=True, help="JSON lines of gold, problem and solutions")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--groups", type=int, default=880)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with gzip.open(arguments.input, "rt", encoding="utf-8") as file:
        lines = [line for line, _ in zip(file, range(arguments.groups), strict=False)]
    records = [json.loads(line) for line in lines]
    items = [(record["gold"], one["text"]) for record in records for one in record["solutions"]]
    # The tokenizer alone gets what the stage gives it: every solution, and every problem once.
    texts = [one["text"] for record in records for one in record["solutions"]]
    texts += [record["problem"] for record in records]
    tokenizer = load_tokenizer(Path(arguments.tokenizer))
    num_characters = sum(map(len, texts))
    filters = FilterConfig(
        duplicate_trajectories=True, duplicate_problems=True, near_duplicates=0.8, max_compression_ratio=12.0
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "input.jsonl"
        path.write_text("".join(lines), encoding="utf-8")
        config = PrepareConfig(
            inputs=(str(path),),
            tokenizer=arguments.tokenizer,
            output=str(Path(folder) / "store"),
            labels=("given",),
            filters=filters,
            workers=1,
            force=True,
        )
        prepare(config)
        encode(tokenizer, texts)
        labelling, tokenising, preparing = [], [], []
        for _ in range(arguments.repeats):
            labelling.append(len(items) / measured(lambda: label(items))[0])
            tokenising.append(num_characters / measured(lambda: encode(tokenizer, texts))[0])
            preparing.append(num_characters / measured(lambda: prepare(config))[0])
    result = {
        "solutions": len(items),
        "characters": num_characters,
        "labelled_per_cpu_second": statistics.median(labelling),
        "tokenizer_characters_per_cpu_second": statistics.median(tokenising),
        "prepared_characters_per_cpu_second": statistics.median(preparing),
        "prepared_share_of_tokenizer": statistics.median(
            one / other for one, other in zip(preparing, tokenising, strict=True)
        ),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
