"""Measures models of the study: accuracy, retention, KL to the base and entropy, with one grading pool for all runs."""

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from megatron_offgrpo.data.grading import GradingPool
from megatron_offgrpo.evaluation.generation import Completion, Request, SamplingSettings, seed_of, stop_token_ids
from megatron_offgrpo.evaluation.grading import Solution, score
from megatron_offgrpo.evaluation.hf_backend import HfBackend
from megatron_offgrpo.evaluation.prompts import encode_prompt, load_prompt_tokenizer
from tools.study.settings import MAX_TOKENS, TEMPERATURES, StudySettings
from tools.study.stores import questions_file, read_questions, student_folder

Record = dict[str, Any]
CURVE_TEMPERATURE, RETENTION_SAMPLES = 0.6, 2


class Measuring:
    """What stays open over many runs: a grading process, its answers so far, and the base student.

    Use as a context manager.
    """

    def __init__(self, settings: StudySettings) -> None:
        self.settings = settings
        base = student_folder(settings)
        self.tokenizer = load_prompt_tokenizer(base, "chat")
        self.stop = stop_token_ids(base, self.tokenizer)
        self.pool = GradingPool(1)
        self.base = HfBackend(base, "fp32")
        self.known: dict[tuple[str, str], int] = {}
        """(reference answer, text) -> reward; equal solutions are graded once."""

    def __enter__(self) -> "Measuring":
        self.pool.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.pool.__exit__(kind, error, trace)

    def questions(self, name: str) -> list[Record]:
        """The records of one file of questions."""
        return read_questions(questions_file(self.settings, name))

    def sample(
        self, model: HfBackend, questions: list[Record], settings: SamplingSettings, samples: int, seed: int
    ) -> list[list[Completion]]:
        """`samples` completions of each question; the prompts of a batch are about equally long."""
        prompts = [encode_prompt(self.tokenizer, one["problem"], None) for one in questions]
        wanted = [(place, k) for place in range(len(questions)) for k in range(samples)]
        wanted.sort(key=lambda one: len(prompts[one[0]]))
        requests = [Request(prompts[place], seed_of(seed, questions[place]["id"], k)) for place, k in wanted]
        found: dict[tuple[int, int], Completion] = {}
        for index, completion in model.generate(requests, settings):
            found[wanted[index]] = completion
        return [[found[place, k] for k in range(samples)] for place in range(len(questions))]

    def rewards(self, questions: list[Record], completions: list[list[Completion]]) -> list[list[int]]:
        """0 or 1 of each completion, by math-verify."""
        texts = [
            [self.tokenizer.decode(one.token_ids, skip_special_tokens=True) for one in several]
            for several in completions
        ]
        pairs = [
            (question["answer"], text) for question, several in zip(questions, texts, strict=True) for text in several
        ]
        new = list(dict.fromkeys(pair for pair in pairs if pair not in self.known))
        for pair, scored in zip(new, score((Solution(*pair) for pair in new), self.pool), strict=True):
            self.known[pair] = scored.lenient
        values = iter(pairs)
        return [[self.known[next(values)] for _ in several] for several in texts]

    def right(
        self, model: HfBackend, questions: list[Record], temperature: float, top_p: float, samples: int, seed: int
    ) -> list[int]:
        """Right samples of each question."""
        settings = SamplingSettings(temperature, top_p, MAX_TOKENS, self.stop)
        return [sum(row) for row in self.rewards(questions, self.sample(model, questions, settings, samples, seed))]

    def brief(self, folder: Path, names: tuple[str, str], seed: int) -> tuple[float, float]:
        """(accuracy, retention) at temperature 0.6, one sample a question."""
        model = HfBackend(folder, "fp32")
        return (
            float(np.mean(self.right(model, self.questions(names[0]), CURVE_TEMPERATURE, 0.95, 1, seed))),
            float(np.mean(self.right(model, self.questions(names[1]), CURVE_TEMPERATURE, 0.95, 1, seed))),
        )

    def accuracy(self, folder: Path, name: str, seed: int) -> float:
        """At temperature 0.6, one sample a question."""
        return float(
            np.mean(self.right(HfBackend(folder, "fp32"), self.questions(name), CURVE_TEMPERATURE, 0.95, 1, seed))
        )

    def full(self, folder: Path, seed: int) -> dict[str, Any]:
        """All measures on the test problems: right samples of each problem, so that intervals can be taken later."""
        model, test, skills = HfBackend(folder, "fp32"), self.questions("test"), self.questions("skills")
        return {
            "right": {
                str(temperature): {
                    "samples": samples,
                    "counts": self.right(model, test, temperature, top_p, samples, seed),
                }
                for temperature, top_p, samples in TEMPERATURES
            },
            "retention": {
                "samples": RETENTION_SAMPLES,
                "counts": self.right(model, skills, CURVE_TEMPERATURE, 0.95, RETENTION_SAMPLES, seed),
            },
            **self.divergence(model, test, seed),
        }

    def divergence(self, model: HfBackend, questions: list[Record], seed: int) -> dict[str, float]:
        """KL(pi || base) and entropy, nats a token, estimated on pi's own samples at temperature 1.

        KL = mean of log pi - log base, entropy = mean of -log pi, over the response tokens of one sample a question.
        """
        settings = SamplingSettings(1.0, 1.0, MAX_TOKENS, self.stop, logprobs=True)
        drawn = [one for (one,) in self.sample(model, questions, settings, 1, seed)]
        prompts = [encode_prompt(self.tokenizer, one["problem"], None) for one in questions]
        scored = self.base.logprobs([(*ids, *one.token_ids) for ids, one in zip(prompts, drawn, strict=True)])
        ours = np.concatenate([np.asarray(one.logprobs) for one in drawn])
        base = np.concatenate([values[-len(one.token_ids) :] for values, one in zip(scored, drawn, strict=True)])
        lengths: Sequence[int] = [len(one.token_ids) for one in drawn]
        return {
            "kl": float((ours - base).mean()),
            "entropy": float(-ours.mean()),
            "response_tokens": float(np.mean(lengths)),
        }
