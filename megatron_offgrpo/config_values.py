"""Configurations as JSON-able values; functions by name."""

import functools
import importlib
import traceback
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any

from megatron_offgrpo.errors import ConfigError


def describe_callable(function: Callable[..., Any]) -> dict[str, Any]:
    """{"call": "module:qualname", "args": bound keyword arguments} of a function or a partial of one."""
    if isinstance(function, functools.partial):
        if function.args:
            raise ConfigError("bind arguments of an objective by keyword", where=repr(function))
        inner = describe_callable(function.func)
        return {"call": inner["call"], "args": {**inner["args"], **function.keywords}}
    return {"call": f"{function.__module__}:{function.__qualname__}", "args": {}}


def resolve_callable(name: str, where: str) -> Callable[..., Any]:
    """The function named `module:qualname`.

    Raises:
        ConfigError: no such module or function, or a module that cannot be imported.
    """
    module_name, _, qualname = name.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), *qualname.split("."))):
        raise ConfigError("not a function's name", where=where, expected="module:function", got=repr(name))
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as cause:
        raise ConfigError(f"no such function ({cause})", where=where, expected="module:function", got=name) from None
    except (Exception, SystemExit) as cause:
        # Foreign code: whatever it raises is the module's fault.
        raise ConfigError(
            f"the module cannot be imported ({place_of(cause)})", where=where, expected="module:function", got=name
        ) from None
    try:
        for part in qualname.split("."):
            found = getattr(found, part)
    except AttributeError as cause:
        raise ConfigError(f"no such function ({cause})", where=where, expected="module:function", got=name) from None
    if not callable(found):
        raise ConfigError("not a function", where=where, expected="module:function", got=name)
    return found


def place_of(cause: BaseException) -> str:
    """What an exception says and the last line of code that it came through."""
    frames = traceback.extract_tb(cause.__traceback__)
    at = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    return f"{type(cause).__name__}: {cause}{at}"


def settings_of(config: Any) -> tuple[str, ...]:
    """Names of the settings of a dataclass: its fields, without those that are left out of a comparison."""
    return tuple(field.name for field in fields(config) if field.compare)


def to_dict(config: Any) -> Any:
    """The configuration as JSON-able values; stored in every artefact made from it."""
    if is_dataclass(config) and not isinstance(config, type):
        return {name: to_dict(getattr(config, name)) for name in settings_of(config)}
    if callable(config):
        return describe_callable(config)
    return config
