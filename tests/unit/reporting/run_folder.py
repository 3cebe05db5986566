"""A run folder as the pipeline leaves it, with made-up figures."""

import json
import math
from pathlib import Path

import numpy as np

from megatron_offgrpo.artifacts import Manifest, write_manifest
from megatron_offgrpo.data.store import StoreRow, write_store
from megatron_offgrpo.evaluation.evaluate import summarise


def write_training(folder, *, steps=40, store=""):
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    lines = []
    for step in range(steps):
        progress = 1 - math.exp(-step / 12)
        line = {
            "step": step,
            "surrogate": -0.02 - 0.01 * progress + 0.002 * rng.normal(),
            "kl": 0.05 * progress,
            "entropy": 0.3 - 0.1 * progress,
            "grad_norm": 0.01 + 0.002 * rng.random(),
            "lr": 3e-4,
            "logp_right": -0.12 + 0.04 * progress,
            "probability_right": 0.9 + 0.04 * progress,
            "packed_tokens": 7000,
            "tokens_per_second": 3000 + 100 * rng.normal(),
            "peak_memory_bytes": 400 * 2**20,
            "seconds": 2.3,
        }
        if step % 3:  # a step without a wrong trajectory logs no wrong side
            line |= {"logp_wrong": -0.2, "probability_wrong": 0.85, "probability_margin": 0.05 + 0.04 * progress}
        lines.append(json.dumps(line) + "\n")
    (folder / "metrics.jsonl").write_text("".join(lines) + '{"step": 40, "surr')  # cut off by a kill
    config = {
        "name": "made_up",
        "paths": {"store": store},
        "objective": {"beta": 0.2, "surrogate": {"call": "m:linear", "args": {}}},
        "seed": 0,
    }
    inputs = {"weights": "aaaa1111"} | ({"store": store_fingerprint(store)} if store else {})
    write_manifest(folder, Manifest("run", "ffff9999", inputs, {"steps": steps}, config))


def store_fingerprint(store):
    return json.loads((Path(store) / "manifest.json").read_text())["fingerprint"]


def write_evaluation(folder, right, *, samples=4, seed=0, text="so \\boxed{{{value}}}"):
    """`right`: number of right samples of each problem."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    graded = []
    for problem, count in enumerate(right):
        for sample in range(samples):
            reward = int(sample < count)
            graded.append(
                {
                    "problem_id": f"p{problem}",
                    "sample_id": sample,
                    "text": text.format(value=7 if reward else 13),
                    "tokens": int(40 + rng.integers(20)),
                    "finish_reason": "stop",
                    "seed": 1,
                    "problem": f"Problem {problem}: is 3 < 4 & 4 > 3?",
                    "answer": "7",
                    "reward": reward,
                    "status": "ok",
                    "extracted": "7",
                }
            )
    (folder / "graded.jsonl").write_text("".join(json.dumps(record) + "\n" for record in graded))
    (folder / "metrics.json").write_text(json.dumps({**summarise(graded, 0), "backend": "hf"}))
    write_manifest(folder, Manifest("evaluation", f"eeee{seed}", {"model": f"dddd{seed}", "benchmark": "bbbb"}))


def write_summary(folder):
    summary = {
        "groups": {"total": 40, "all_positive": 30, "mixed": 9, "all_negative": 1},
        "layout": {"tp": 2, "pp": 1, "dp": 1, "cp": 1},
        "stage_seconds": {"prepare": 12.5, "convert": 3.1, "reference": 9.0, "train": 92.0, "evaluate": 44.0},
    }
    (folder / "summary.json").write_text(json.dumps(summary))


def write_small_store(path):
    """Three groups: all right, mixed, all wrong; responses of 3 and 5 tokens."""

    def row(name, rewards):
        return StoreRow(
            group_id=name,
            problem="p",
            answer="7",
            prompt_ids=[1, 2],
            response_ids=[[3, 4, 5], [3, 4, 5, 6, 7]],
            rewards=rewards,
            given_rewards=[None, None],
            label_statuses=["ok", "ok"],
            sources=["teacher", "teacher"],
            on_policy=[False, False],
            truncated=[False, False],
            behaviour_logprobs=[None, None],
            sample_ids=[None, None],
            texts=["a", "b"],
        )

    rows = [row("a", [1.0, 1.0]), row("b", [1.0, 0.0]), row("c", [0.0, 0.0])]
    write_store(path, rows, tokenizer_fingerprint="toy", inputs={}, counts={}, config={})
