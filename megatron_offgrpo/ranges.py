"""Fields of a configuration stay within what their types declare: numbers within a range, choices among the choices."""

import math
import operator
import types
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt

from megatron_offgrpo.errors import ConfigError

LARGEST = 2**32
"""A larger whole number is a slip, whatever it counts; arithmetic on it overflows somewhere."""
Natural = Annotated[int, Ge(0)]
"""A whole number from 0 on."""
Count = Annotated[int, Ge(1)]
"""A whole number from 1 on."""
Seed = Annotated[int, Ge(0), Lt(2**32)]
"""What NumPy's generators take."""
NonNegative = Annotated[float, Ge(0)]
Positive = Annotated[float, Gt(0)]
Share = Annotated[float, Ge(0), Le(1)]

Bound = Ge | Gt | Le | Lt
_MEANINGS: dict[type, tuple[str, Callable[[Any, Any], bool]]] = {
    Ge: ("at least", operator.ge),
    Gt: ("above", operator.gt),
    Le: ("at most", operator.le),
    Lt: ("below", operator.lt),
}


class Ranged:
    """Base of a dataclass whose numeric fields declare their ranges as `Annotated` bounds.

    Args:
        section: what stands before a field's name where it is set: `layout` for `layout.tp`, `--` for an option of the
            command line, nothing for the name alone.
    """

    section: ClassVar[str] = ""

    def __init_subclass__(cls, *, section: str = "", **more: Any) -> None:
        super().__init_subclass__(**more)
        cls.section = section

    def __post_init__(self) -> None:
        """Refuses a value outside its field's range.

        Raises:
            ConfigError: it names the field, the range and the value.
        """
        for name, kind, bounds in constraints(type(self)):
            value = getattr(self, name)
            if value is None or _fits(value, kind, bounds):
                continue
            where = (
                f"--{name.replace('_', '-')}" if self.section == "--" else ".".join(filter(None, (self.section, name)))
            )
            what = "not a choice" if get_origin(kind) is Literal else "out of range"
            too_large = isinstance(value, int) and value > LARGEST
            expected = f"at most {LARGEST}" if too_large else described(kind, bounds)
            raise ConfigError(what, where=where, expected=expected, got=repr(value))


def constraints(config: type) -> Iterator[tuple[str, Any, tuple[Bound, ...]]]:
    """(field, int, float or a Literal, bounds) of every numeric field and every choice; None beside them is allowed."""
    hints = get_type_hints(config, include_extras=True)
    for field in fields(config):
        bounds: list[Bound] = []
        waiting = [hints[field.name]]
        while waiting:
            hint = waiting.pop()
            if get_origin(hint) is Annotated:
                inner, *more = get_args(hint)
                bounds += [bound for bound in more if isinstance(bound, Bound)]
                waiting.append(inner)
            elif get_origin(hint) in (Union, types.UnionType):
                waiting += get_args(hint)
            elif hint in (int, float) or get_origin(hint) is Literal:
                yield field.name, hint, tuple(bounds)


def _fits(value: Any, kind: Any, bounds: tuple[Bound, ...]) -> bool:
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if isinstance(value, bool) or not isinstance(value, int | float if kind is float else int):
        return False
    if kind is int and value > LARGEST:
        return False
    return math.isfinite(value) and all(_MEANINGS[type(bound)][1](value, _limit(bound)) for bound in bounds)


def _limit(bound: Bound) -> Any:
    """Each kind of bound keeps its limit under its own name: `Ge.ge`."""
    return getattr(bound, type(bound).__name__.lower())


def described(kind: Any, bounds: tuple[Bound, ...]) -> str:
    """What a field takes, for a person."""
    if get_origin(kind) is Literal:
        return " or ".join(map(str, get_args(kind)))
    limits = " and ".join(f"{_MEANINGS[type(bound)][0]} {_limit(bound)}" for bound in bounds)
    return " ".join(filter(None, ("a whole number" if kind is int else "a finite number", limits)))
