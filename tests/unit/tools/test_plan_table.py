"""The generated tables of docs/parallelism.md are those that the code makes now."""

from itertools import takewhile
from pathlib import Path

from tools.plan_table import model_table, recipe_table

DOCS = Path(__file__).parents[3] / "docs" / "parallelism.md"
REMEDY = "python -m tools.plan_table makes the tables of docs/parallelism.md"


def table_of_docs(header: str) -> list[str]:
    lines = DOCS.read_text().splitlines()
    return list(takewhile(lambda line: line.startswith("|"), lines[lines.index(header) :]))


def test_the_recipes_in_the_docs():
    expected = recipe_table()
    assert table_of_docs(expected[0]) == expected, REMEDY


def test_the_models_in_the_docs():
    expected = list(model_table())
    assert table_of_docs(expected[0]) == expected, REMEDY
