"""Runs one back end in a process of its own: `python -m tests.system.backend_probe vllm|hf MODEL BENCHMARK OUTPUT`.

Writes greedy completions and the log-probs of prompt and completion, seeded samples drawn in one order and in the
other, completions under penalties, top-k and min-p, and the metrics of a small evaluation.
"""

import json
import sys
from pathlib import Path

from megatron_offgrpo.data.tokenisation import load_tokenizer
from megatron_offgrpo.evaluation.benchmarks import load_benchmark
from megatron_offgrpo.evaluation.evaluate import EvaluationConfig, evaluate
from megatron_offgrpo.evaluation.generation import (
    BackendConfig,
    Request,
    SamplingSettings,
    Shaping,
    open_backend,
    seed_of,
    stop_token_ids,
)
from megatron_offgrpo.evaluation.prompts import encode_prompt

MAX_TOKENS = 96
SHAPED = {
    "repetition": (0.0, Shaping(repetition_penalty=1.3)),
    "presence": (0.0, Shaping(presence_penalty=1.5)),
    "frequency": (0.0, Shaping(frequency_penalty=0.7)),
    "all": (0.0, Shaping(repetition_penalty=1.1, presence_penalty=0.4, frequency_penalty=0.2)),
    # One token is left at each step, whatever the random numbers.
    "top_k": (2.0, Shaping(top_k=1)),
    "min_p": (2.0, Shaping(min_p=1.0)),
}


def ids_of(drawn):
    """Token ids in the order of the requests."""
    found = dict(drawn)
    return [list(found[index].token_ids) for index in range(len(found))]


def main(name: str, model: Path, benchmark: Path, output: Path) -> None:
    tokenizer, questions = load_tokenizer(model), load_benchmark(benchmark)
    stop = stop_token_ids(model, tokenizer)
    requests = [
        Request(encode_prompt(tokenizer, question.problem, None), seed_of(0, question.problem_id, 0))
        for question in questions
    ]
    with open_backend(BackendConfig(model, name, "fp32")) as backend:
        greedy = dict(backend.generate(requests, SamplingSettings(0.0, 1.0, MAX_TOKENS, stop)))
        cut = dict(backend.generate(requests[:4], SamplingSettings(0.0, 1.0, 5, stop)))
        wild = SamplingSettings(2.0, 1.0, MAX_TOKENS, stop)
        seeded = dict(backend.generate(requests, wild))
        backwards = dict(backend.generate(requests[::-1][:7], wild))
        shaped = {
            name: ids_of(
                backend.generate(requests, SamplingSettings(temperature, 1.0, MAX_TOKENS, stop, shaping=shaping))
            )
            for name, (temperature, shaping) in SHAPED.items()
        }
        greedy_ids = [list(greedy[index].token_ids) for index in range(len(requests))]
        whole = [[*request.prompt_ids, *ids] for request, ids in zip(requests, greedy_ids, strict=True)]
        logprobs = backend.logprobs(whole)
    settings = {"samples": 2, "temperature": 0.8, "top_p": 1.0, "max_tokens": MAX_TOKENS}
    metrics = evaluate(
        EvaluationConfig(
            model, benchmark, output, backend=BackendConfig(model, name, "fp32"), grading_processes=1, **settings
        )
    )
    result = {
        "greedy": greedy_ids,
        "reasons": [greedy[index].finish_reason for index in range(len(requests))],
        "cut": [[len(cut[index].token_ids), cut[index].finish_reason] for index in range(4)],
        "seeded": [list(seeded[index].token_ids) for index in range(len(requests))],
        "backwards": [list(backwards[index].token_ids) for index in range(7)],
        "shaped": shaped,
        "logprobs": logprobs,
        "vocabulary": len(tokenizer),
        "metrics": metrics,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1], *map(Path, sys.argv[2:]))
