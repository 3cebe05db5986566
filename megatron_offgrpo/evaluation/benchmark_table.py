"""The benchmarks that have a name: where their records are and which fields hold what."""

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any

from megatron_offgrpo.data.fields import plain_number

Record = dict[str, Any]


@dataclass(frozen=True)
class Asked:
    """One record, read."""

    problem: str
    answer: str
    problem_id: str | None = None
    """None numbers the records."""
    options: tuple[str, ...] = ()
    """Of a multiple-choice question, whose answer is then a letter."""


@dataclass(frozen=True)
class HubSource:
    """A dataset on the Hugging Face hub."""

    path: str
    split: str
    config: str | None = None


@dataclass(frozen=True)
class Benchmark:
    """A named benchmark."""

    title: str
    file: str
    """Local files are `FILE.*` or `FILE/` in the data folder."""
    hub: tuple[HubSource, ...]
    """Read one after the other."""
    read: Callable[[Record], Asked]
    num_problems: int
    """As published."""
    rows: tuple[int, int] | None = None
    """Range of the local file's records that belong to it; None takes all."""


def open_question(*names: str, answer: str = "answer", id: str | None = None) -> Callable[[Record], Asked]:
    """Reads the problem from the first of these fields that a record has."""

    def read(record: Record) -> Asked:
        problem = next((record[name] for name in names if record.get(name)), "")
        value = record.get(answer)
        return Asked(str(problem), "" if value is None else _answer_text(value), _id(record, id))

    return read


def gsm8k(record: Record) -> Asked:
    """The answer is a worked solution; the number follows `####`."""
    return Asked(record["question"], str(record["answer"]).rpartition("####")[2].strip())


def olympiadbench(record: Record) -> Asked:
    """`final_answer` is a list, nearly always of one text; several are one list of answers."""
    answers = record["final_answer"]
    text = ", ".join(map(_answer_text, answers)) if isinstance(answers, list) else _answer_text(answers)
    context = f"{record['context']}\n\n" if record.get("context") else ""
    return Asked(context + record["question"], text, _id(record, "id"))


def mmlu_pro(record: Record) -> Asked:
    """Up to ten options; `answer` is the letter. Padding options called N/A are left out (they stand at the end)."""
    options = list(record["options"])
    while options and options[-1] == "N/A":
        options.pop()
    return Asked(record["question"], str(record["answer"]), _id(record, "question_id"), tuple(options))


def gpqa(record: Record) -> Asked:
    """The right answer stands first in the data: the four options are shuffled by a seed made from the question."""
    right = str(record["Correct Answer"]).strip()
    options = [right, *(str(record[f"Incorrect Answer {number}"]).strip() for number in (1, 2, 3))]
    question = str(record["Question"]).strip()
    seed = int.from_bytes(hashlib.sha256(question.encode()).digest()[:8], "little")
    order = random.Random(seed).sample(range(4), 4)
    letter = ascii_uppercase[order.index(0)]
    return Asked(question, letter, _id(record, "Record ID"), tuple(options[place] for place in order))


def arc(record: Record) -> Asked:
    """Labels are letters, or 1 to 5 in some records; either way the options are lettered in their order."""
    labels, texts = list(record["choices"]["label"]), list(record["choices"]["text"])
    letter = ascii_uppercase[labels.index(record["answerKey"])]
    return Asked(record["question"], letter, _id(record, "id"), tuple(texts))


def _answer_text(value: Any) -> str:
    return plain_number(value) if isinstance(value, float) else str(value)


def _id(record: Record, name: str | None) -> str | None:
    return None if name is None or record.get(name) is None else str(record[name])


AIME25 = ("problem", "question", "prompt")
TABLE: dict[str, Benchmark] = {
    "aime24": Benchmark(
        "AIME 2024 (I and II)",
        "aime24",
        (HubSource("HuggingFaceH4/aime_2024", "train"),),
        open_question("problem", id="id"),
        30,
    ),
    "aime25": Benchmark(
        "AIME 2025 (I and II)",
        "aime25",
        (
            HubSource("opencompass/AIME2025", "test", "AIME2025-I"),
            HubSource("opencompass/AIME2025", "test", "AIME2025-II"),
        ),
        open_question(*AIME25),
        30,
    ),
    "aime25-1": Benchmark(
        "AIME 2025 I",
        "aime25",
        (HubSource("opencompass/AIME2025", "test", "AIME2025-I"),),
        open_question(*AIME25),
        15,
        rows=(0, 15),
    ),
    "aime25-2": Benchmark(
        "AIME 2025 II",
        "aime25",
        (HubSource("opencompass/AIME2025", "test", "AIME2025-II"),),
        open_question(*AIME25),
        15,
        rows=(15, 30),
    ),
    "amc23": Benchmark(
        "AMC 12 2023",
        "amc23",
        (HubSource("math-ai/amc23", "test"),),
        open_question("problem", "question", id="id"),
        40,
    ),
    "math500": Benchmark(
        "MATH-500",
        "math500",
        (HubSource("HuggingFaceH4/MATH-500", "test"),),
        open_question("problem", id="unique_id"),
        500,
    ),
    "minerva": Benchmark(
        "Minerva (MIT OpenCourseWare)",
        "minerva",
        (HubSource("math-ai/minervamath", "test"),),
        open_question("problem", "question"),
        272,
    ),
    "olympiadbench": Benchmark(
        "OlympiadBench (English, mathematics, text only)",
        "olympiadbench",
        (HubSource("Hothan/OlympiadBench", "train", "OE_TO_maths_en_COMP"),),
        olympiadbench,
        674,
    ),
    "gsm8k": Benchmark("GSM8K", "gsm8k", (HubSource("openai/gsm8k", "test", "main"),), gsm8k, 1319),
    "mmlu-pro": Benchmark("MMLU-Pro", "mmlu-pro", (HubSource("TIGER-Lab/MMLU-Pro", "test"),), mmlu_pro, 12032),
    "gpqa-diamond": Benchmark(
        "GPQA-Diamond", "gpqa-diamond", (HubSource("Idavidrein/gpqa", "train", "gpqa_diamond"),), gpqa, 198
    ),
    "arc-challenge": Benchmark(
        "ARC-Challenge", "arc-challenge", (HubSource("allenai/ai2_arc", "test", "ARC-Challenge"),), arc, 1172
    ),
}
