"""Options that several commands share."""

from typing import Annotated

import typer

Recipe = Annotated[
    str, typer.Argument(help="A function in recipes/ (quickstart, openthinker3_7b, ...) or module:function.")
]
Set = Annotated[list[str] | None, typer.Option("--set", help="path=value, e.g. plan.epochs=3; may be repeated.")]
Force = Annotated[bool, typer.Option("--force", help="Do it again although a finished result is there.")]


def print_lines(lines: list[str]) -> None:
    """Prints what a command found."""
    print("\n".join(lines))
