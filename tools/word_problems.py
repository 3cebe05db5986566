"""Multi-step arithmetic word problems with teacher solutions: the data of the quick start.

A holder's count of things changes step by step. One kind of step is a comparison in inconsistent language, "that is 5
more than Tom has", which asks for a subtraction; the keyword habit adds instead (Lewis & Mayer 1987, the consistency
hypothesis). Whoever reads the sentence again gets it right. The teacher nearly always does; the base student
(`tools/base_student.py`) does so about half the time.

    python -m tools.word_problems --output DIR [--problems 320] [--solutions 16] [--benchmark 200] [--seed 0]

writes DIR/trajectories.jsonl, DIR/benchmark.jsonl and DIR/validation.jsonl. Everything follows from the seed; the three
draw from disjoint parts of the problem space, so no seed puts a problem of one file into another.
"""

import argparse
import hashlib
import json
import os
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_offgrpo.errors import ConfigError, OffgrpoError

Split = Literal["train", "validation", "benchmark"]
Kind = Literal["gain", "loss", "double", "plain_more", "plain_fewer", "is_more", "is_fewer"]

NAMES = ("Ana", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gia", "Hugo", "Iris", "Jon", "Kim", "Leo", "Mia", "Tom")
THINGS = ("apples", "books", "coins", "cards", "shells", "stamps", "marbles", "pens", "stones", "tickets")
INCONSISTENT: tuple[Kind, ...] = ("is_more", "is_fewer")
"""The steps of the weakness: the keyword says one operation, the sentence asks for the other."""
OTHER_KINDS: tuple[Kind, ...] = ("gain", "gain", "loss", "loss", "double", "plain_more", "plain_fewer")

TEXTS: dict[Kind, tuple[str, ...]] = {
    "gain": ("{holder} buys {n} more.", "{holder} finds {n} {thing}."),
    "loss": ("{holder} gives away {n}.", "{holder} loses {n} {thing}."),
    "double": ("Then {holder} doubles the {thing}.",),
    "plain_more": ("{other} has {n} more than {holder}.",),
    "plain_fewer": ("{other} has {n} fewer than {holder}.",),
    "is_more": ("That is {n} more than {other} has.", "That is {n} more {thing} than {other} has."),
    "is_fewer": ("That is {n} fewer than {other} has.", "That is {n} fewer {thing} than {other} has."),
}
OPERATOR: dict[Kind, str] = {
    "gain": "+", "loss": "-", "double": "*", "plain_more": "+", "plain_fewer": "-", "is_more": "-", "is_fewer": "+",
}  # fmt: skip
PLAIN_LEADS = ("{holder} has {equation}.", "So {holder} has {equation}.")
CAREFUL_LEAD, HASTY_LEAD = "Reading again, {holder} has {equation}.", PLAIN_LEADS[1]
"""How an inconsistent comparison begins that is read properly, and one that follows the keyword. Each has one form, so
that the odds of the two do not depend on the sampling temperature."""
ENDING = "The answer is \\boxed{{{value}}}."
NUM_INCONSISTENT = ((0, 0.12), (1, 0.63), (2, 0.25))
"""(number of inconsistent comparisons in a problem, share of the problems)."""
LARGEST = 60
HARD_SHARE, HARD_ERROR, EASY_ERROR = 0.18, 0.15, 0.006
"""The teacher errs independently in each solution, at 15 % on hard problems and 0.6 % on others: with 16 solutions a
group, 0.18 (1 - 0.85^16) + 0.82 (1 - 0.994^16) = 24 % of the groups hold a wrong one."""

HABIT_ERRORS = 0.75
"""Share of the teacher's errors that are the keyword habit, where the problem tempts to it; the rest are slips."""


@dataclass(frozen=True)
class Step:
    """One sentence of a problem."""

    kind: Kind
    amount: int
    holder: str
    """Who holds the things before the step."""
    after: str
    """Who is asked about after the step: another person after a comparison."""
    text: str


@dataclass(frozen=True)
class Problem:
    """A word problem and its answer."""

    text: str
    answer: int
    start: int
    thing: str
    steps: tuple[Step, ...]


def apply(operator: str, value: int, amount: int) -> int:
    """value (+, -, *) amount."""
    if operator == "+":
        return value + amount
    return value - amount if operator == "-" else value * amount


def habit_operator(kind: Kind) -> str:
    """The operation that the keyword suggests: the wrong one in an inconsistent comparison."""
    if kind in INCONSISTENT:
        return "+" if OPERATOR[kind] == "-" else "-"
    return OPERATOR[kind]


def split_of(text: str) -> Split:
    """The part of the problem space a problem belongs to: half training, a quarter validation, a quarter benchmark."""
    part = hashlib.sha256(text.encode()).digest()[0] % 4
    return "benchmark" if part == 0 else "validation" if part == 1 else "train"


def draw_problem(rng: random.Random, split: Split) -> Problem:
    """A problem of `split`; every habit along the way keeps all values within 1..60."""
    while True:
        problem = _draw(rng)
        if problem is not None and split_of(problem.text) == split:
            return problem


def _draw(rng: random.Random) -> Problem | None:
    num_inconsistent = rng.choices([n for n, _ in NUM_INCONSISTENT], [share for _, share in NUM_INCONSISTENT])[0]
    num_other = rng.randint(2 if num_inconsistent < 2 else 1, 2)
    kinds: list[Kind] = [rng.choice(INCONSISTENT) for _ in range(num_inconsistent)]
    kinds += [rng.choice(OTHER_KINDS) for _ in range(num_other)]
    rng.shuffle(kinds)
    people = rng.sample(NAMES, 1 + len(kinds))
    thing, start = rng.choice(THINGS), rng.randint(5, 40)
    holder = people.pop()
    sentences, steps, possible = [f"{holder} has {start} {thing}."], [], {start}
    for kind in kinds:
        amount = 2 if kind == "double" else rng.randint(2, 12)
        after = holder if kind in ("gain", "loss", "double") else people.pop()
        text = rng.choice(TEXTS[kind]).format(holder=holder, other=after, n=amount, thing=thing)
        steps.append(Step(kind, amount, holder, after, text))
        sentences.append(text)
        possible = {apply(op, v, amount) for v in possible for op in (OPERATOR[kind], habit_operator(kind))}
        if min(possible) < 1 or max(possible) > LARGEST:
            return None
        holder = after
    value = start
    for step in steps:
        value = apply(OPERATOR[step.kind], value, step.amount)
    sentences.append(f"How many {thing} does {holder} have?")
    return Problem(" ".join(sentences), value, start, thing, tuple(steps))


def write_solution(problem: Problem, rng: random.Random, *, habit: float = 0.0, slip_at: int | None = None) -> str:
    r"""A worked solution that ends in \boxed{}.

    Args:
        habit: probability, in each inconsistent comparison, of following the keyword.
        slip_at: index of a step whose result comes out too large, by 1 or 10 (smaller could turn negative later).
    """
    value, lines = problem.start, []
    for index, step in enumerate(problem.steps):
        wrong = step.kind in INCONSISTENT and rng.random() < habit
        operator = habit_operator(step.kind) if wrong else OPERATOR[step.kind]
        result = apply(operator, value, step.amount)
        if index == slip_at:
            result += rng.choice((1, 10))
        lead = rng.choice(PLAIN_LEADS)
        if step.kind in INCONSISTENT:
            lead = HASTY_LEAD if wrong else CAREFUL_LEAD
        lines.append(lead.format(holder=step.after, equation=f"{value}{operator}{step.amount}={result}"))
        value = result
    return " ".join([*lines, ENDING.format(value=value)])


def write_teacher_solution(problem: Problem, rng: random.Random, error: float) -> str:
    """The teacher's solution: wrong with probability `error`, by the keyword habit or by a slip of arithmetic."""
    if rng.random() >= error:
        return write_solution(problem, rng)
    if any(step.kind in INCONSISTENT for step in problem.steps) and rng.random() < HABIT_ERRORS:
        return write_solution(problem, rng, habit=1.0)
    return write_solution(problem, rng, slip_at=rng.randrange(len(problem.steps)))


def make_problems(count: int, split: Split, seed: int) -> list[Problem]:
    """`count` different problems of `split`."""
    rng = random.Random(f"{split}:{seed}")
    found: dict[str, Problem] = {}
    while len(found) < count:
        problem = draw_problem(rng, split)
        found.setdefault(problem.text, problem)
    return list(found.values())


def make_groups(num_problems: int, num_solutions: int, seed: int) -> list[dict[str, Any]]:
    """Trajectory groups in the input form of `offgrpo prepare`, without rewards: those come from grading."""
    groups = []
    for index, problem in enumerate(make_problems(num_problems, "train", seed)):
        rng = random.Random(f"teacher:{seed}:{index}")
        error = HARD_ERROR if rng.random() < HARD_SHARE else EASY_ERROR
        texts = [write_teacher_solution(problem, rng, error) for _ in range(num_solutions)]
        groups.append(
            {
                "group_id": f"train-{seed}-{index}",
                "problem": problem.text,
                "answer": str(problem.answer),
                "trajectories": [{"text": text, "source": "teacher"} for text in texts],
            }
        )
    return groups


def make_benchmark(num_problems: int, split: Split, seed: int) -> list[dict[str, Any]]:
    """Held-out problems: `{id, problem, answer}`."""
    return [
        {"id": f"{split}-{seed}-{index}", "problem": problem.text, "answer": str(problem.answer)}
        for index, problem in enumerate(make_problems(num_problems, split, seed))
    ]


def write_jsonl(path: Path, records: list[dict[str, Any]]) -> None:
    """Writes one record a line; a killed writer leaves no part under the final name."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    os.replace(temporary, path)


def write_problem_set(output: Path, *, problems: int, solutions: int, benchmark: int, seed: int) -> dict[str, Path]:
    """Writes the three files and returns their paths by name.

    Raises:
        ConfigError: a count below 1.
    """
    for name, value in (("problems", problems), ("solutions", solutions), ("benchmark", benchmark)):
        if value < 1:
            raise ConfigError("must be at least 1", where=f"--{name}", got=value)
    output.mkdir(parents=True, exist_ok=True)
    contents = {
        "trajectories": make_groups(problems, solutions, seed),
        "benchmark": make_benchmark(benchmark, "benchmark", seed),
        "validation": make_benchmark(benchmark, "validation", seed),
    }
    paths = {name: output / f"{name}.jsonl" for name in contents}
    for name, records in contents.items():
        write_jsonl(paths[name], records)
    return paths


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.word_problems", description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for the three files")
    parser.add_argument("--problems", type=int, default=320, help="training problems (trajectory groups)")
    parser.add_argument("--solutions", type=int, default=16, help="teacher solutions per training problem")
    parser.add_argument("--benchmark", type=int, default=200, help="held-out problems, and as many for validation")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    try:
        paths = write_problem_set(
            options.output,
            problems=options.problems,
            solutions=options.solutions,
            benchmark=options.benchmark,
            seed=options.seed,
        )
    except OffgrpoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for path in paths.values():
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
