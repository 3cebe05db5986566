"""Finds a recipe by name and applies `--set path=value`, strictly."""

import ast
import difflib
import functools
import importlib
import inspect
import math
import pkgutil
import shlex
import types
from collections.abc import Callable, Iterable, Sequence
from dataclasses import is_dataclass, replace
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from megatron_offgrpo.config import RunConfig
from megatron_offgrpo.config_values import place_of, resolve_callable, settings_of
from megatron_offgrpo.data_config import PrepareConfig
from megatron_offgrpo.errors import ConfigError, OffgrpoError


def load_recipe(name: str, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration of a recipe in recipes/ (`quickstart`) or of `module:function`, with overrides applied.

    Raises:
        ConfigError: unknown recipe, or an override that does not fit.
    """
    recipe = resolve_callable(name, where="RECIPE") if ":" in name else _find(name)
    config = _called(recipe, name, RunConfig)
    for override in overrides:
        config = apply_override(config, override)
    return replace(config, typed=shlex.join((name, *(word for one in overrides for word in ("--set", one)))))


def _called[Config: (RunConfig, PrepareConfig)](recipe: Callable[..., Any], name: str, kind: type[Config]) -> Config:
    """What a recipe returns.

    Raises:
        ConfigError: not a function that returns `kind`.
    """
    expected = f"a function without arguments that returns {kind.__name__}"
    try:
        config = recipe()
    except OffgrpoError:
        raise
    except (Exception, SystemExit) as cause:
        # Foreign code: whatever it raises is the recipe's fault.
        raise ConfigError(f"the recipe fails ({place_of(cause)})", where=name, expected=expected) from None
    if not isinstance(config, kind):
        raise ConfigError("not a recipe", where=name, expected=expected, got=type(config).__name__)
    return config


def list_recipes() -> dict[str, Callable[[], RunConfig]]:
    """Name -> function, for every function in recipes/ that returns a RunConfig and needs no argument."""
    return _functions_returning(RunConfig)


def _functions_returning(kind: type) -> dict[str, Callable[[], Any]]:
    import recipes

    found: dict[str, Callable[[], Any]] = {}
    for module_info in pkgutil.iter_modules(recipes.__path__):
        module = importlib.import_module(f"recipes.{module_info.name}")
        for name, function in inspect.getmembers(module, inspect.isfunction):
            is_own = function.__module__ == module.__name__ and not name.startswith("_")
            needs_none = all(p.default is not p.empty for p in inspect.signature(function).parameters.values())
            if is_own and needs_none and get_type_hints(function).get("return") is kind:
                found[name] = function
    return found


def load_data_recipe(name: str) -> PrepareConfig:
    """The settings of a recipe for data in recipes/ (`openthoughts3_math`) or of `module:function`.

    Raises:
        ConfigError: unknown recipe.
    """
    if ":" in name:
        recipe = resolve_callable(name, where="--recipe")
    else:
        known = list_data_recipes()
        if name not in known:
            expected = f"one of {', '.join(sorted(known))}, or module:function"
            raise ConfigError("unknown recipe for data", where="--recipe", expected=expected, got=name)
        recipe = known[name]
    return _called(recipe, name, PrepareConfig)


def list_data_recipes() -> dict[str, Callable[[], PrepareConfig]]:
    """Name -> function, for every function in recipes/ that returns a PrepareConfig."""
    return _functions_returning(PrepareConfig)


def _find(name: str) -> Callable[[], RunConfig]:
    known = list_recipes()
    if name not in known:
        raise ConfigError(
            "unknown recipe",
            where="RECIPE",
            expected=f"one of {', '.join(sorted(known))}, or module:function",
            got=name,
            remedy=_nearest(name, known),
        )
    return known[name]


def apply_override(config: RunConfig, override: str) -> RunConfig:
    """A copy of the configuration with one `path=value`, for example `plan.epochs=3`.

    An argument of the objective's functions is a path of its own: `objective.surrogate=shaped` takes another function
    of the same module (or `module:function`), `objective.surrogate.gamma=0.2` binds an argument.

    Raises:
        ConfigError: not path=value, no such path (the nearest one is named), or a value of the wrong type.
    """
    path, equals, text = override.partition("=")
    keys = path.split(".")
    if not equals or "" in keys:
        expected = "path=value, the path of names with one dot between them"
        raise ConfigError("not an override", where=f"--set {override}", expected=expected)
    return _set(config, keys, text, path)


def _set(node: Any, keys: list[str], text: str, path: str) -> Any:
    key, *rest = keys
    if callable(node) and not is_dataclass(node):
        return _bind(node, key, text, path)
    hints = get_type_hints(type(node)) if is_dataclass(node) else {}
    if not hints or key not in settings_of(node):
        raise ConfigError(
            "no such setting",
            where=f"--set {path}",
            got=key,
            remedy=_nearest(path, _paths_beside(node, path, key)),
        )
    value = getattr(node, key)
    if rest:
        return replace(node, **{key: _set(value, rest, text, path)})
    if is_dataclass(value):
        inside = ", ".join(f"{path}.{name}" for name in settings_of(value))
        raise ConfigError("a section, not a setting", where=f"--set {path}", expected=f"one of {inside}")
    return replace(node, **{key: _parse(text, hints[key], value, path)})


def _bind(function: Callable[..., Any], argument: str, text: str, path: str) -> Callable[..., Any]:
    parameters = inspect.signature(function).parameters
    names = [name for name, parameter in parameters.items() if parameter.kind is parameter.KEYWORD_ONLY]
    if argument not in names:
        raise ConfigError(
            "no such argument",
            where=f"--set {path}",
            expected=f"one of {', '.join(names)}" if names else "a function with keyword arguments",
            got=argument,
            remedy=_nearest(argument, names),
        )
    value = _literal(text, path)
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError("not a finite number", where=f"--set {path}", got=text)
    return functools.partial(function, **{argument: value})


def _literal(text: str, path: str) -> Any:
    try:
        return ast.literal_eval({"none": "None", "true": "True", "false": "False"}.get(text.lower(), text))
    except (ValueError, SyntaxError):
        raise ConfigError("not a number, true, false or none", where=f"--set {path}", got=text) from None


def _parse(text: str, hint: Any, current: Any, path: str) -> Any:
    origin = get_origin(hint)
    if origin is Callable or callable(current):
        module = getattr(current, "func", current).__module__
        return resolve_callable(text if ":" in text else f"{module}:{text}", where=f"--set {path}")
    if origin is Literal:
        if text not in get_args(hint):
            raise ConfigError(
                "not a choice",
                where=f"--set {path}",
                expected=" or ".join(map(str, get_args(hint))),
                got=text,
                remedy=_nearest(text, get_args(hint)),
            )
        return text
    if origin in (Union, types.UnionType):
        if text.lower() == "none":
            return None
        (hint,) = [part for part in get_args(hint) if part is not type(None)]
        return _parse(text, hint, current, path)
    if hint is str:
        return text
    value = _literal(text, path)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not hint:
        raise ConfigError("wrong type", where=f"--set {path}", expected=hint.__name__, got=text)
    return value


def _paths_beside(node: Any, path: str, key: str) -> list[str]:
    prefix = path[: path.rindex(key)]
    beside = [prefix + name for name in settings_of(node)] if is_dataclass(node) else []
    # A section left out is the commonest slip: `epochs` for `plan.epochs`.
    inner = [
        f"{p}.{name}"
        for p in beside
        if is_dataclass(section := getattr(node, p.rsplit(".", 1)[-1]))
        for name in settings_of(section)
    ]
    return beside + inner


def _nearest(name: str, known: Iterable[str]) -> str | None:
    choices = list(known)
    tails = {choice.rsplit(".", 1)[-1]: choice for choice in choices}
    close = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    close = close or [tails[t] for t in difflib.get_close_matches(name, list(tails), n=1, cutoff=0.5)]
    return f"did you mean {close[0]}?" if close else None
