"""Values bound to several names: `x=1, y=2`, `(x,y)=(1,2)`, `Tom: 5, Ann: 6`, and several such solutions."""

import re
from dataclasses import dataclass
from functools import lru_cache

from megatron_offgrpo.data.left_sides import binding
from megatron_offgrpo.data.structure import Bracket, Listing, Node, structure

_NAMES = re.compile(r"\s*\(([^()=]*,[^()=]*)\)\s*(?:=|\\in(?![A-Za-z]))\s*(.+)", re.DOTALL)
_INDEXED = re.compile(r"(\D*?)_?{?(\d*)}?")


@dataclass(frozen=True)
class Bindings:
    """The names in their order, and for each solution the values in the order of the names."""

    names: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def tuples(self, names: tuple[str, ...]) -> str:
        """The solutions as a text of tuples, the values in the order of `names`."""
        places = [self.names.index(name) for name in names]
        return ", ".join(f"({', '.join(row[place] for place in places)})" for row in self.rows)

    def usual_order(self) -> tuple[str, ...]:
        """The names as coordinates stand: neighbours in the alphabet by the alphabet, others as they were written."""
        return tuple(sorted(self.names, key=_key)) if _neighbours(self.names) else self.names


def _key(name: str) -> tuple[str, int]:
    match = _INDEXED.fullmatch(name)
    return (match[1], int(match[2] or 0)) if match else (name, 0)


def _neighbours(names: tuple[str, ...]) -> bool:
    """Whether the names are letters in turn, or one letter with indices."""
    if all(re.fullmatch("[A-Za-z]", name) for name in names):
        codes = sorted(map(ord, names))
        return codes == list(range(codes[0], codes[0] + len(codes)))
    return all(_INDEXED.fullmatch(name) for name in names) and len({_key(name)[0] for name in names}) == 1


@lru_cache(maxsize=1024)
def bindings(text: str) -> Bindings | None:
    """The values that `text`, which is normalised, binds to two names or more; None where it does no such thing."""
    shape = structure(text)
    items = shape.items if isinstance(shape, Listing) else (shape,)
    return _of_tuples(items) or _one_by_one(items)


def _of_tuples(items: tuple[Node, ...]) -> Bindings | None:
    """The solutions of `(x,y)=(1,2), (2,1)`; the names may stand before each."""
    names: tuple[str, ...] = ()
    rows: list[tuple[str, ...]] = []
    for item in items:
        match = _NAMES.fullmatch(item.text)
        if match is not None:
            own = tuple(_spelled(name) for name in match[1].split(","))
            if names and own != names:
                return None
            names = own
        shape = structure(match[2]) if match else item
        for solution in shape.items if isinstance(shape, Bracket) and shape.opened == "{" else (shape,):
            if not isinstance(solution, Bracket) or (solution.opened, solution.closed) != ("(", ")"):
                return None
            rows.append(tuple(entry.text for entry in solution.items))
    if not names or len(set(names)) < len(names) or any(len(row) != len(names) for row in rows):
        return None
    return Bindings(names, tuple(rows))


def _one_by_one(items: tuple[Node, ...]) -> Bindings | None:
    """The solutions of `x=1, y=2, x=2, y=1`: the names repeat with each."""
    found = [binding(item.text) for item in items]
    pairs = [(_spelled(pair[0]), pair[1]) for pair in found if pair is not None]
    size = len({name for name, _ in pairs})
    if len(pairs) < len(items) or size < 2 or len(pairs) % size:
        return None
    solutions = [dict(pairs[start : start + size]) for start in range(0, len(pairs), size)]
    names = tuple(solutions[0])
    if any(set(solution) != set(names) or len(solution) < size for solution in solutions):
        return None
    return Bindings(names, tuple(tuple(solution[name] for name in names) for solution in solutions))


def _spelled(name: str) -> str:
    """The name without blanks and braces; of words the case does not count."""
    bare = re.sub(r"[\s{}]", "", name)
    return bare.casefold() if re.search(r"[^\W\d_]{3}", bare) and "\\" not in bare else bare
