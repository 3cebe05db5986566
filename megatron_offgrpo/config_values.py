"""Configurations as JSON-able values; functions by name."""

import functools
import importlib
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
        ConfigError: no such module or function.
    """
    module_name, _, qualname = name.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
        for part in qualname.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as cause:
        raise ConfigError(f"no such function ({cause})", where=where, expected="module:function", got=name) from None
    if not callable(found):
        raise ConfigError("not a function", where=where, expected="module:function", got=name)
    return found


def to_dict(config: Any) -> Any:
    """The configuration as JSON-able values; stored in every artefact made from it."""
    if is_dataclass(config) and not isinstance(config, type):
        return {field.name: to_dict(getattr(config, field.name)) for field in fields(config)}
    if callable(config):
        return describe_callable(config)
    return config
