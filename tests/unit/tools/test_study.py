import inspect
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_offgrpo.errors import ConfigError, DataError
from megatron_offgrpo.reporting.study_report import markdown, study_page
from recipes.study import ABLATIONS, ARMS, SMALL, Arm
from tools.study import __main__ as command
from tools.study import analysis, problems, records
from tools.study.models import make_tokenizer
from tools.study.problems import Problem, Step
from tools.study.runner import chosen_lr, name_of, sweep_jobs, wanted
from tools.study.runs import Job
from tools.study.settings import SWEEP_SEED, StudySettings

TRAP = Problem(
    text="Ana has 23 . Ana finds 5 . That is 4 more than Ben has . How many has Ben ?",
    answer=24,
    level=1,
    start=23,
    steps=(Step("finds", 5, "Ana", "Ana"), Step("is_more", 4, "Ana", "Ben")),
)
BASE, BIAS = (next(arm for arm in ARMS if arm.name == name) for name in ("base", "bias"))


class TestProblems:
    def test_right_and_habitual_solutions(self):
        rng = random.Random(0)
        right = problems.write_solution(TRAP, rng, habit={}, style="short")
        assert right == r"23 + 5 = 28 , 28 - 4 = 24 , \boxed{ 24 }"
        habitual = problems.write_solution(TRAP, rng, habit={"is_more": 1.0}, style="worded")
        assert habitual == r"so 23 + 5 = 28 ; so 28 + 4 = 32 ; answer \boxed{ 32 }"

    def test_sentences(self):
        assert [problems.sentence(step) for step in TRAP.steps] == ["Ana finds 5 .", "That is 4 more than Ben has ."]
        assert problems.sentence(Step("has_fewer", 3, "Ana", "Ben")) == "Ben has 3 fewer than Ana ."

    def test_answer_follows_the_sentences(self):
        for level in (1, 2):
            for problem in problems.make_problems(40, "test", 3, level):
                value = problem.start
                for step in problem.steps:
                    gains = step.kind in ("finds", "has_more", "is_fewer")
                    value += step.amount if gains else -step.amount
                assert value == problem.answer
                assert sum(step.kind in problems.TRAPS for step in problem.steps) == level == problem.level

    def test_splits_are_disjoint_and_levels_alternate(self):
        texts = {
            split: {one["problem"] for one in problems.make_questions(60, split, 0)} for split in ("train", "test")
        }
        assert not texts["train"] & texts["test"]
        ids = [one["id"].split("-")[0] for one in problems.make_questions(5, "validation", 0)]
        assert ids == ["level1", "level2", "level1", "level2", "level1"]

    def test_skills(self):
        for one in problems.make_skill_questions(60, "test", 0):
            words, answer = one["problem"].split(), int(one["answer"])
            numbers = [int(word) for word in words if word.isdigit()]
            if words[0] == "second":
                assert answer == sorted(numbers)[1]
            else:
                assert answer == problems.CODES[words[2]][numbers[0] - 1]

    def test_facts_are_the_same_in_every_split(self):
        found = [
            {one["problem"]: one["answer"] for one in problems.make_skill_questions(200, split, 0)}
            for split in ("train", "test")
        ]
        common = found[0].keys() & found[1].keys()
        assert len(common) > 20
        assert all(text.startswith("code") for text in common)
        assert all(found[0][text] == found[1][text] for text in common)

    def test_a_text_has_its_own_tokens_back(self):
        tokenizer = make_tokenizer()
        text = problems.write_solution(TRAP, random.Random(0), habit={}, style="worded")
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert len(ids) == len(text.split())
        assert tokenizer.decode(ids) == text


RECORDS = [
    {"group_id": str(number), "problem": "p", "answer": "1", "trajectories": [{"text": "t", "reward": r} for r in row]}
    for number, row in enumerate([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0], [1.0, 1.0]])
]


class TestRecords:
    def test_wrong_lookup_takes_the_eighth_of_the_index(self):
        rewards = [[float(number)] for number in range(17)]
        assert records.wrong_lookup(rewards) == [[0.0]] * 8 + [[1.0]] * 8 + [[2.0]]

    def test_shuffled_keeps_the_number_of_right_ones(self):
        rewards = records.rewards_of(RECORDS) * 20
        mixed = records.shuffled(rewards)
        assert mixed != rewards
        assert sum(map(sum, mixed)) == 5 * 20
        assert {len(row) for row in mixed} == {2}

    def test_flipped(self):
        rewards = [[1.0] * 1000]
        assert records.flipped(rewards, 0.0) == rewards
        assert records.flipped(rewards, 1.0) == [[0.0] * 1000]
        assert 1000 - sum(records.flipped(rewards, 0.2)[0]) == pytest.approx(200, abs=60)

    def test_of_share(self):
        assert [one["group_id"] for one in records.of_share(RECORDS, 50, 2)] == ["0", "1"]
        assert [one["group_id"] for one in records.of_share(RECORDS, 100, 2)] == ["1", "3"]
        with pytest.raises(DataError, match="1 all-positive and 0 other"):
            records.of_share(RECORDS, 100, 3)


SETTINGS = StudySettings(root=Path("study"), lrs=(1e-4, 3e-4), extensions=2, seeds=(0, 1))


def swept(arm: Arm, **figures: tuple[float, float]) -> dict:
    found = {name_of(Job(BASE, 0.0, SWEEP_SEED, True), SETTINGS): {"accuracy": 0.3, "retention": 0.9}}
    for lr, (accuracy, retention) in figures.items():
        found[name_of(Job(arm, float(lr), SWEEP_SEED, True), SETTINGS)] = {"accuracy": accuracy, "retention": retention}
    return found


class TestSweep:
    def test_grid_goes_on_beyond_its_best_end(self):
        results = swept(BIAS, **{"1e-4": (0.4, 0.9), "3e-4": (0.5, 0.9)})
        assert [job.lr for job in sweep_jobs(BIAS, results, SETTINGS)] == [1e-4, 3e-4, 1e-3]
        assert chosen_lr(BIAS, results, SETTINGS) is None
        assert all(job.sweep for job in wanted(BIAS, results, SETTINGS))
        results = swept(BIAS, **{"1e-4": (0.4, 0.9), "3e-4": (0.5, 0.9), "1e-3": (0.45, 0.9)})
        assert chosen_lr(BIAS, results, SETTINGS) == 3e-4
        assert [(job.lr, job.seed, job.sweep) for job in wanted(BIAS, results, SETTINGS)] == [
            (3e-4, 0, False),
            (3e-4, 1, False),
        ]

    def test_lost_retention_counts_and_gained_does_not(self):
        # 0.6 - (0.9 - 0.5) = 0.2 < 0.4; a retention of 1 adds nothing, so equal scores take the smaller rate.
        results = swept(BIAS, **{"3e-5": (0.3, 0.9), "1e-4": (0.4, 0.9), "3e-4": (0.6, 0.5)})
        assert chosen_lr(BIAS, results, SETTINGS) == 1e-4
        results = swept(BIAS, **{"3e-5": (0.4, 1.0), "1e-4": (0.4, 0.9), "3e-4": (0.4, 0.9), "1e-5": (0.1, 0.9)})
        assert chosen_lr(BIAS, results, SETTINGS) == 3e-5

    def test_equal_scores_at_the_low_end_go_on_from_there(self):
        """The rates beyond an end come last and count in order: a tie of 3e-5 with 1e-4 asks for 1e-5."""
        results = swept(BIAS, **{"1e-4": (0.4, 0.9), "3e-4": (0.3, 0.9), "3e-5": (0.4, 0.9)})
        assert [job.lr for job in sweep_jobs(BIAS, results, SETTINGS)] == [1e-5, 3e-5, 1e-4, 3e-4]

    def test_a_seed_of_the_sweep_is_refused(self):
        with pytest.raises(ConfigError, match="seeds"):
            replace(SETTINGS, seeds=(SWEEP_SEED,))


class TestArms:
    def test_names_are_unique_and_keys_differ(self, monkeypatch):
        monkeypatch.setattr("tools.study.runs.shared_fingerprint", lambda settings: "models")
        arms = [*ARMS, *ABLATIONS]
        assert len({arm.name for arm in arms}) == len(arms)
        assert set(SMALL) <= {arm.name for arm in ARMS}
        keys = [Job(arm, 1e-3, 0, False).key(SETTINGS) for arm in arms]
        assert len(set(keys)) == len(keys)
        assert Job(BIAS, 1e-3, 1, False).key(SETTINGS) != Job(BIAS, 1e-3, 0, False).key(SETTINGS)

    def test_another_body_of_an_objective_is_another_key(self, monkeypatch):
        monkeypatch.setattr("tools.study.runs.shared_fingerprint", lambda settings: "models")
        before = Job(BIAS, 1e-3, 0, False).key(SETTINGS)
        text = inspect.getsource
        monkeypatch.setattr(inspect, "getsource", lambda one: text(one).replace("exp", "expm1"))
        assert Job(BIAS, 1e-3, 0, False).key(SETTINGS) != before


class TestAnalysis:
    def test_resamples_weigh_seeds_and_problems(self):
        draws = analysis.Resamples(2, 3, 3, resamples=1)
        draws.seeds_RS = np.array([[0.75, 0.25]])
        draws.problems[3] = np.array([[2 / 3, 0.0, 1 / 3]])
        # seed 0: (2 * 1 + 0 * 0 + 1 * 0.5) / 3 = 5/6; seed 1: (0 + 0 + 1) / 3 = 1/3; 3/4 and 1/4 of them: 17/24
        assert draws.means(np.array([[1.0, 0.0, 0.5], [0.0, 1.0, 1.0]])) == pytest.approx([17 / 24])

    def test_interval_covers_the_spread_of_seeds(self):
        """Two seeds drawn with replacement give 0.4 alone, or 0.6 alone, in a quarter of the cases: both are in it."""
        draws = analysis.Resamples(2, 50, 50, resamples=2000)
        assert analysis.figure(np.repeat([[0.4], [0.6]], 50, axis=1), draws) == {
            "mean": pytest.approx(0.5),
            "ci95": (pytest.approx(0.4), pytest.approx(0.6)),
        }

    def test_reach(self):
        curve = [[0, 0.0, 0.2], [100, 2.0, 0.4], [200, 4.0, 0.8]]
        assert analysis.reach(curve, 0.6, 0) == pytest.approx(150)
        assert analysis.reach(curve, 0.3, 1) == pytest.approx(1.0)
        assert analysis.reach(curve, 0.1, 1) == 0.0
        assert analysis.reach(curve, 0.9, 1) is None

    def test_claims(self, monkeypatch):
        monkeypatch.setattr(analysis, "teacher_facts", lambda settings: {"accuracy": 0.9, "all_positive_share": 0.75})
        right = {"base": 1, "shuffled": 1, "no_bias": 2, "on_policy": 2, "bias": 3, "sft": 4}
        arms = [arm for arm in ARMS if arm.name in right]
        summary = analysis.summarise(TINY, arms, results_of(arms, right, {"sft": 0}), "test")
        found = {one["claim"]: one for one in summary["claims"]}
        # 4 samples a problem: bias 0.75, no bias 0.5. SFT 1.0, but it lost all of its retention of 1: adjusted 0.
        assert found[1]["difference"] == pytest.approx(0.25)
        assert found[2]["difference"] == pytest.approx(0.75)
        assert found[3]["difference"] == 0
        # The curve runs from 0.25 to 0.75 in 8 s; on-policy's 0.5 is reached after 4 s, and takes on-policy 8 s.
        assert found[4]["ratio"] == pytest.approx(0.5)
        assert [found[number]["verdict"] for number in (1, 2, 3, 4)] == ["supported"] * 4
        assert "SFT on positives" in study_page(summary, "Study")
        table = markdown(summary)
        assert "| 1. the all-positive bias adds to accuracy | bias - no_bias | difference 0.250 |" in table
        # Every problem and seed is alike, so that the intervals are points.
        assert (
            "| SFT on positives | +0.750 (0.750 to 0.750) | +0.750 (0.750 to 0.750) | -1.000 (-1.000 to -1.000) |"
            in table
        )


TINY = replace(SETTINGS, test=4, skills=2, lrs=(1e-3,), extensions=0)
SWEPT = {"lr": 1e-3, "accuracy": 0.5, "retention": 0.9, "cpu_seconds": 1.0, "seconds": 2.0}


def run_of(right: int, kept: int) -> dict:
    return {
        "right": {name: {"samples": 4, "counts": [right] * 4} for name in ("0.0", "0.6", "1.0")},
        "retention": {"samples": 2, "counts": [kept] * 2},
        "curve": [{"tokens": 800, "seconds": 8.0, "accuracy": right / 4}],
        "kl": 0.1, "entropy": 0.5, "response_tokens": 20.0, "tokens": 800, "steps": 16, "train_seconds": 8.0,
        "cpu_seconds": 10.0, "seconds": 12.0,
    }  # fmt: skip


def results_of(arms: list[Arm], right: dict[str, int], kept: dict[str, int]) -> dict:
    """Right samples of 4 in every problem, and what is kept of 2 in every question, by arm."""
    results = {name_of(Job(BASE, 0.0, SWEEP_SEED, True), TINY): SWEPT}
    for arm in arms:
        results[name_of(Job(arm, 1e-3, SWEEP_SEED, True), TINY)] = SWEPT
        for seed in TINY.seeds:
            lr = 0.0 if arm.objective is None else 1e-3
            results[name_of(Job(arm, lr, seed, False), TINY)] = run_of(right[arm.name], kept.get(arm.name, 2))
    return results


@pytest.mark.parametrize(("right", "status"), [(3, 0), (2, 1), (1, 1)])
def test_status_of_the_small_study(right, status, monkeypatch, tmp_path):
    """1 where the bias (`right` of 4) is not shown to beat no bias (2 of 4)."""
    arms = [arm for arm in ARMS if arm.name in SMALL]
    results = results_of(arms, {"base": 1, "shuffled": 1, "no_bias": 2, "bias": right}, {})
    monkeypatch.setattr(analysis, "teacher_facts", lambda settings: {"accuracy": 0.9, "all_positive_share": 0.75})
    monkeypatch.setattr(command, "run_study", lambda settings, arms, workers: results)
    assert command.study(replace(TINY, root=tmp_path), arms, which="small", workers=0) == status
    assert command.study(replace(TINY, root=tmp_path), arms, which="core", workers=0) == 0


@pytest.mark.parametrize(
    ("ci95", "told"), [((0.01, 0.2), "supported"), ((-0.2, -0.01), "refuted"), ((-0.1, 0.1), "undecided")]
)
def test_verdict(ci95, told):
    assert analysis.verdict(ci95, supported=lambda low, _: low > 0, refuted=lambda _, high: high < 0) == told
