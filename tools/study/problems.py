"""The study's task family: short word problems with a trap, solutions in two styles, and unrelated skills.

A count changes hands step by step. "That is 4 more than Tom has" asks for a subtraction; the keyword habit adds (Lewis
& Mayer 1987). Every word, number and sign is one token of the study's vocabulary, so that a text has exactly one
tokenisation and a solution 15 to 40 tokens.

Level 1 has one such comparison, level 2 has two. The unrelated skills (240 facts, and the second smallest of some
numbers) are never trained on in the study; they show what is forgotten.
"""

import hashlib
import json
import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Split = Literal["train", "validation", "test"]
Style = Literal["short", "worded"]

NAMES = ("Ana", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gia", "Hugo")
LETTERS = ("a", "b", "c", "d")
LARGEST = 60
"""Every value on every path, habit included, lies in 1..LARGEST."""
AMOUNTS = (2, 9)
TRAPS = ("is_more", "is_fewer")
OTHERS = ("finds", "loses", "has_more", "has_fewer")
SIGN = {"finds": "+", "loses": "-", "has_more": "+", "has_fewer": "-", "is_more": "-", "is_fewer": "+"}
WORDS = (
    "has", "finds", "loses", "more", "fewer", "than", "That", "is", "How", "many", "code", "second", "smallest", "of",
    "so", "answer", ".", "?", ";", ",", "+", "-", "=",
)  # fmt: skip
BOX, CLOSE = "\\boxed{", "}"
NUMBERS = tuple(str(number) for number in range(LARGEST + 1))
FACT_SHARE = 0.5
"""Share of the questions on unrelated skills that ask for a fact."""
CODES = {letter: random.Random(f"code:{letter}").choices(range(1, LARGEST + 1), k=LARGEST) for letter in LETTERS}
"""The facts: letter -> code of the numbers 1 to LARGEST, drawn once."""


@dataclass(frozen=True)
class Step:
    """One sentence after the first: its kind, amount, and who is asked about before and after it."""

    kind: str
    amount: int
    before: str
    after: str


@dataclass(frozen=True)
class Problem:
    """A word problem."""

    text: str
    answer: int
    level: int
    start: int
    steps: tuple[Step, ...]


def vocabulary() -> list[str]:
    """Every word of the family, in a fixed order."""
    return [*WORDS, BOX, CLOSE, *NAMES, *LETTERS, *NUMBERS]


def split_of(text: str) -> Split:
    """Half of the problem space trains, a quarter validates, a quarter tests: no seed mixes them."""
    part = hashlib.sha256(text.encode()).digest()[0] % 4
    return "test" if part == 0 else "validation" if part == 1 else "train"


def sentence(step: Step) -> str:
    """The sentence of a step."""
    match step.kind:
        case "finds" | "loses":
            return f"{step.before} {step.kind} {step.amount} ."
        case "has_more" | "has_fewer":
            return f"{step.after} has {step.amount} {step.kind[4:]} than {step.before} ."
        case _:
            return f"That is {step.amount} {step.kind[3:]} than {step.after} has ."


def combine(value: int, sign: str, amount: int) -> int:
    """value + amount or value - amount."""
    return value + amount if sign == "+" else value - amount


def draw_problem(rng: random.Random, split: Split, level: int) -> Problem:
    """A problem of `split` and `level` (the number of its traps)."""
    while True:
        kinds = [*rng.choices(TRAPS, k=level), *rng.choices(OTHERS, k=rng.randint(1, 2))]
        rng.shuffle(kinds)
        names = rng.sample(NAMES, len(kinds) + 1)
        start, holder, steps = rng.randint(5, 45), names[0], list[Step]()
        for number, kind in enumerate(kinds, 1):
            after = holder if kind in ("finds", "loses") else names[number]
            steps.append(Step(kind, rng.randint(*AMOUNTS), holder, after))
            holder = after
        text = " ".join([f"{names[0]} has {start} .", *map(sentence, steps), f"How many has {holder} ?"])
        answer = _answer_in_range(start, steps)
        if answer is not None and split_of(text) == split:
            return Problem(text, answer, level, start, tuple(steps))


def _answer_in_range(start: int, steps: list[Step]) -> int | None:
    """The right answer; None where some path of readings leaves 1..LARGEST."""
    values = {start}
    right = start
    for step in steps:
        signs = "+-" if step.kind in TRAPS else SIGN[step.kind]
        values = {combine(value, sign, step.amount) for value in values for sign in signs}
        right = combine(right, SIGN[step.kind], step.amount)
        if min(values) < 1 or max(values) > LARGEST:
            return None
    return right


def write_solution(problem: Problem, rng: random.Random, *, habit: dict[str, float], style: Style) -> str:
    """A solution that follows the keyword in a trap of kind k with probability habit[k]."""
    value, lines = problem.start, list[str]()
    for step in problem.steps:
        sign = SIGN[step.kind]
        if rng.random() < habit.get(step.kind, 0.0):
            sign = "-" if sign == "+" else "+"
        result = combine(value, sign, step.amount)
        equation = f"{value} {sign} {step.amount} = {result}"
        lines.append(f"so {equation} ;" if style == "worded" else f"{equation} ,")
        value = result
    return " ".join([*lines, *(["answer"] if style == "worded" else []), BOX, str(value), CLOSE])


def draw_skill(rng: random.Random, split: Split) -> tuple[str, str, int]:
    """(question, solution, answer) of an unrelated skill; facts cannot be split, they are known or not."""
    if rng.random() < FACT_SHARE:
        letter, number = rng.choice(LETTERS), rng.randint(1, LARGEST)
        answer = CODES[letter][number - 1]
        return f"code of {letter} {number} ?", f"{BOX} {answer} {CLOSE}", answer
    while True:
        numbers = rng.sample(range(1, LARGEST), rng.randint(3, 5))
        question = f"second smallest of {' , '.join(map(str, numbers))} ?"
        if split_of(question) == split:
            ordered = sorted(numbers)
            return question, f"{' '.join(map(str, ordered))} {BOX} {ordered[1]} {CLOSE}", ordered[1]


def make_problems(count: int, split: Split, seed: int, level: int) -> list[Problem]:
    """`count` different problems of one level."""
    rng = random.Random(f"{split}:{level}:{seed}")
    found: dict[str, Problem] = {}
    while len(found) < count:
        problem = draw_problem(rng, split, level)
        found.setdefault(problem.text, problem)
    return list(found.values())


def make_questions(count: int, split: Split, seed: int) -> list[dict[str, Any]]:
    """`count` problems, alternating between level 1 and level 2, as benchmark records; the id begins with the level."""
    by_level = [make_problems((count + 1) // 2, split, seed, level) for level in (1, 2)]
    mixed = [problem for pair in zip(*by_level, strict=True) for problem in pair][:count]
    return [
        {"id": f"level{one.level}-{split}-{number}", "problem": one.text, "answer": str(one.answer)}
        for number, one in enumerate(mixed)
    ]


def make_skill_questions(count: int, split: Split, seed: int) -> list[dict[str, Any]]:
    """`count` different questions on the unrelated skills, as benchmark records."""
    rng = random.Random(f"skill:{split}:{seed}")
    found: dict[str, int] = {}
    while len(found) < count:
        question, _, answer = draw_skill(rng, split)
        found.setdefault(question, answer)
    return [
        {"id": f"skill-{split}-{number}", "problem": question, "answer": str(answer)}
        for number, (question, answer) in enumerate(found.items())
    ]


def write_jsonl(path: Path, records: list[dict[str, Any]]) -> None:
    """Writes one record a line; a killed writer leaves no part under the final name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    os.replace(temporary, path)
