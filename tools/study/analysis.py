"""From the runs to study.json: each arm's figures with intervals, and the claims of docs/study.md."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_offgrpo.evaluation.statistics import pass_at
from recipes.study import Arm
from tools.study.runner import Results, chosen_lr, name_of, sweep_jobs
from tools.study.runs import Job
from tools.study.settings import StudySettings
from tools.study.stores import teacher_facts

RESAMPLES, CHUNK = 10_000, 500
MARGIN = 0.02
"""What counts as nothing lost, and as nothing gained."""
MAIN = "0.6"
"""The temperature of an accuracy without more words."""
COMPARED = ("base", "bias", "sft")
"""Arms that every other is compared with."""
Rates = npt.NDArray[np.float64]
"""[seeds, problems] share of right samples."""


class Resamples:
    """Seeds and problems drawn with replacement, the same for every arm, so that differences are paired."""

    def __init__(self, num_seeds: int, num_problems: int, num_skills: int, *, resamples: int = RESAMPLES) -> None:
        rng = np.random.default_rng(0)
        self.seeds_RS = _weights(rng, resamples, num_seeds)
        self.problems = {count: _weights(rng, resamples, count) for count in dict.fromkeys((num_problems, num_skills))}

    def means(self, rates_SP: Rates) -> Rates:
        """The mean of each resample: sum_sp u_s v_p rate_sp, u and v the shares in which seeds and problems came."""
        problems_RP = self.problems[rates_SP.shape[1]]
        return np.einsum("rs,rs->r", self.seeds_RS, problems_RP @ rates_SP.T)


def _weights(rng: np.random.Generator, resamples: int, count: int) -> Rates:
    return rng.multinomial(count, np.full(count, 1 / count), size=resamples) / count


def interval(values: Rates) -> tuple[float, float]:
    """The middle 95 %."""
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def figure(rates_SP: Rates, draws: Resamples) -> dict[str, Any]:
    """Mean and interval."""
    return {"mean": float(rates_SP.mean()), "ci95": interval(draws.means(rates_SP))}


def rates(runs: Sequence[dict[str, Any]], name: str) -> Rates:
    """Of the test problems at a temperature, or of `retention`."""
    found = [run["retention"] if name == "retention" else run["right"][name] for run in runs]
    return np.array([[count / one["samples"] for count in one["counts"]] for one in found])


class Study:
    """The finished runs of a study, arm by arm, seeds in order."""

    def __init__(self, settings: StudySettings, arms: Sequence[Arm], results: Results) -> None:
        self.settings, self.arms, self.results = settings, arms, results
        self.lr = {arm.name: self._lr(arm) for arm in arms}
        self.runs = {
            arm.name: [
                results[name_of(Job(arm, self.lr[arm.name], seed, sweep=False), settings)] for seed in settings.seeds
            ]
            for arm in arms
        }
        self.draws = Resamples(len(settings.seeds), settings.test, settings.skills)

    def _lr(self, arm: Arm) -> float:
        if arm.objective is None:
            return 0.0
        lr = chosen_lr(arm, self.results, self.settings)
        assert lr is not None
        return lr

    def accuracy(self, name: str) -> Rates:
        """Resampled accuracy."""
        return self.draws.means(rates(self.runs[name], MAIN))

    def adjusted(self, name: str) -> Rates:
        """Resampled accuracy - max(0, retention of the base - retention)."""
        base, own = (self.draws.means(rates(self.runs[one], "retention")) for one in ("base", name))
        return self.accuracy(name) - np.maximum(0.0, base - own)

    def adjusted_mean(self, name: str) -> float:
        """The same of the whole."""
        base, own = (float(rates(self.runs[one], "retention").mean()) for one in ("base", name))
        return float(rates(self.runs[name], MAIN).mean()) - max(0.0, base - own)

    def arm(self, arm: Arm) -> dict[str, Any]:
        """One line of the table."""
        runs, name = self.runs[arm.name], arm.name
        main = rates(runs, MAIN)
        levels = {f"level{level}": main[:, level - 1 :: 2] for level in (1, 2)}
        return {
            "name": name,
            "title": arm.title,
            "lr": self.lr[name],
            "sweep": self._sweep(arm),
            "accuracy": {temperature: figure(rates(runs, temperature), self.draws) for temperature in runs[0]["right"]},
            "levels": {level: float(values.mean()) for level, values in levels.items()},
            "pass_at_4": {temperature: self._pass_at(runs, temperature) for temperature in ("0.6", "1.0")},
            "retention": figure(rates(runs, "retention"), self.draws),
            "adjusted": {"mean": self.adjusted_mean(name), "ci95": interval(self.adjusted(name))},
            **{field: _mean(runs, field) for field in ("kl", "entropy", "response_tokens", "tokens", "steps")},
            "train_seconds": _mean(runs, "train_seconds"),
            "reference_seconds": _mean(runs, "reference_seconds"),
            "rollout_seconds": _mean(runs, "rollout_seconds"),
            "rollout_tokens": _mean(runs, "rollout_tokens"),
            "curve": self.curve(name),
            "versus": self._versus(name),
        }

    def _sweep(self, arm: Arm) -> list[dict[str, Any]]:
        """Accuracy and retention on the validation problems at each rate; `failed` says how training broke."""
        if arm.objective is None:
            return []
        jobs = sweep_jobs(arm, self.results, self.settings)
        found = [self.results[name_of(job, self.settings)] for job in jobs]
        fields = ("lr", "accuracy", "retention", "failed")
        return [{field: one[field] for field in fields if field in one} for one in found]

    def _versus(self, name: str) -> dict[str, dict[str, Any]]:
        """This arm minus base, released objective and SFT, on the same resamples; where the study has them."""
        others = [other for other in COMPARED if other in self.runs and other != name]
        return {other: {of: self._minus(name, other, of) for of in ("0.0", MAIN, "retention")} for other in others}

    def _minus(self, name: str, other: str, of: str) -> dict[str, Any]:
        return figure(rates(self.runs[name], of) - rates(self.runs[other], of), self.draws)

    def _pass_at(self, runs: Sequence[dict[str, Any]], temperature: str) -> float:
        values = []
        for run in runs:
            one = run["right"][temperature]
            right_PK = np.arange(one["samples"])[None, :] < np.array(one["counts"])[:, None]
            values.append(pass_at(right_PK.astype(np.float64), one["samples"]))
        return float(np.mean(values))

    def curve(self, name: str) -> list[list[float]]:
        """[tokens, seconds, accuracy] at each point, means over seeds; the base student first."""
        start = [0.0, 0.0, float(rates(self.runs["base"], MAIN).mean())] if "base" in self.runs else None
        curves = [run["curve"] for run in self.runs[name]]
        if not curves[0]:
            return []
        points = [
            [float(np.mean([curve[place][field] for curve in curves])) for field in ("tokens", "seconds", "accuracy")]
            for place in range(len(curves[0]))
        ]
        return [start, *points] if start else points

    def difference(self, first: str, second: str, *, adjusted: bool = False) -> dict[str, Any]:
        """Second minus first, with its interval."""
        of: Callable[[str], Rates] = self.adjusted if adjusted else self.accuracy
        means = [
            self.adjusted_mean(name) if adjusted else float(rates(self.runs[name], MAIN).mean())
            for name in (first, second)
        ]
        return {
            "first": first,
            "second": second,
            "difference": means[1] - means[0],
            "ci95": interval(of(second) - of(first)),
        }


def _mean(runs: Sequence[dict[str, Any]], field: str) -> float | None:
    """Over seeds; None where the arm does not have it."""
    return float(np.mean([run[field] for run in runs])) if field in runs[0] else None


def reach(curve: Sequence[Sequence[float]], target: float, column: int) -> float | None:
    """Tokens (column 0) or seconds (column 1) at which a curve first has the target accuracy, interpolated linearly."""
    for before, after in pairwise(curve):
        if after[2] >= target:
            share = 0.0 if before[2] >= target else (target - before[2]) / (after[2] - before[2])
            return before[column] + share * (after[column] - before[column])
    return None


def verdict(
    ci95: tuple[float, float], *, supported: Callable[[float, float], bool], refuted: Callable[[float, float], bool]
) -> str:
    """What docs/study.md says of an interval."""
    return "supported" if supported(*ci95) else "refuted" if refuted(*ci95) else "undecided"


def claims(study: Study) -> list[dict[str, Any]]:
    """The claims whose arms are there, with their verdicts."""
    found = []
    if {"no_bias", "bias"} <= study.runs.keys():
        one = study.difference("no_bias", "bias")
        told = verdict(one["ci95"], supported=lambda low, _: low > 0, refuted=lambda _, high: high < 0)
        found.append({"claim": 1, "text": "the all-positive bias adds to accuracy", **one, "verdict": told})
    if {"sft", "bias", "base"} <= study.runs.keys():
        one = study.difference("sft", "bias", adjusted=True)
        told = verdict(one["ci95"], supported=lambda low, _: low > -MARGIN, refuted=lambda _, high: high < 0)
        text = "offline GRPO with bias is no worse than SFT, adjusted accuracy"
        found.append({"claim": 2, "text": text, **one, "verdict": told})
    if {"base", "shuffled"} <= study.runs.keys():
        one = study.difference("base", "shuffled")
        told = verdict(one["ci95"], supported=lambda _, high: high < MARGIN, refuted=lambda low, _: low > 0)
        found.append({"claim": 3, "text": "shuffled rewards give nothing", **one, "verdict": told})
    if {"base", "bias", "on_policy"} <= study.runs.keys():
        found.append(_claim_of_time(study))
    return found


def _claim_of_time(study: Study) -> dict[str, Any]:
    """Time of the offline arm to the accuracy that on-policy training ends with, over the on-policy arm's time."""
    target = float(rates(study.runs["on_policy"], MAIN).mean())
    start, curve = float(rates(study.runs["base"], MAIN).mean()), study.curve("bias")
    seconds = reach(curve, target, 1)
    text = "offline GRPO with bias reaches the accuracy of on-policy GRPO in less time"
    claim = {"claim": 4, "text": text, "first": "on_policy", "second": "bias", "target_accuracy": target}
    if target <= start:
        # On-policy training gained nothing: there is no accuracy to reach.
        return {**claim, "ratio": None, "ci95": None, "verdict": "undecided"}
    if seconds is None:
        return {**claim, "ratio": None, "ci95": None, "verdict": "refuted"}
    share = seconds / curve[-1][1]
    own, other = (np.array([run["curve"][-1]["seconds"] for run in study.runs[name]]) for name in ("bias", "on_policy"))
    ratios = (study.draws.seeds_RS @ (own * share)) / (study.draws.seeds_RS @ other)
    told = verdict(interval(ratios), supported=lambda _, high: high < 1, refuted=lambda low, _: low > 1)
    return {**claim, "ratio": float(own.mean() * share / other.mean()), "ci95": interval(ratios), "verdict": told}


def summarise(settings: StudySettings, arms: Sequence[Arm], results: Results, command: str) -> dict[str, Any]:
    """What study.json holds."""
    study = Study(settings, arms, results)
    lines = [study.arm(arm) for arm in arms]
    target = next((line["accuracy"][MAIN]["mean"] for line in lines if line["name"] == "on_policy"), None)
    for line in lines:
        reached = {
            name: target and reach(line["curve"], target, column) for column, name in enumerate(("tokens", "seconds"))
        }
        line["to_on_policy_accuracy"] = reached if target else None
    return {
        "command": command,
        "seeds": list(settings.seeds),
        "problems": settings.test,
        "skills": settings.skills,
        "teacher": teacher_facts(settings),
        "claims": claims(study),
        "arms": lines,
        "cpu_seconds": sum(result["cpu_seconds"] for result in results.values()),
        "run_seconds": sum(result["seconds"] for result in results.values()),
        "runs": len(results),
    }
