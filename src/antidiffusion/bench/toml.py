"""Values of a TOML file, none of them believed: each function raises a ValueError that names what is wrong."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, TypeVar, get_args, get_origin

T = TypeVar("T")


def changed(method: T, options: dict[str, Any], name: str) -> T:
    """Return a copy of a frozen dataclass with other settings, each of the type that its field has."""
    only(options, set(vars(method)), name)
    for each in fields(method):  # type: ignore[arg-type]
        if each.name in options and get_origin(each.type) is not tuple:
            typed(each.type, options, each.name, None)
    change: Callable[..., T] = replace
    return change(method, **options)


def typed(kind: Any, content: Mapping[str, Any], key: str, default: Any) -> Any:
    """Return a value after making sure that it is of a plain type or a union of such; whole numbers are floats too."""
    value = content.get(key, default)
    kinds = get_args(kind) or (kind,)
    if type(value) not in (*kinds, int if float in kinds else kind):
        raise ValueError(f"expected {key} as {getattr(kind, '__name__', kind)}, got {value!r}; change it")
    return value


def listed(kind: Any, content: Mapping[str, Any], key: str, default: Sequence[Any]) -> tuple[Any, ...]:
    """Return a list whose entries are all of a plain type."""
    values = content.get(key, default)
    if not isinstance(values, list | tuple):
        raise ValueError(f"expected a list of {key}, got {values!r}; put it in brackets")
    return tuple(typed(kind, {key: value}, key, value) for value in values)


def table(content: dict[str, Any], key: str) -> dict[str, Any]:
    """Return a table of a table, empty if there is none."""
    value = content.get(key, {})
    if not isinstance(value, dict):
        raise ValueError(f"expected a table {key}, got {value!r}; write [{key}]")
    return value


def names(
    given: Sequence[str] | Mapping[str, Any], known: Mapping[str, Any] | Sequence[str], noun: str
) -> tuple[str, ...]:
    """Return names after making sure that each is known."""
    for name in given:
        if name not in known:
            raise ValueError(f"expected {noun} of {', '.join(known)}, got {name!r}; check the spelling")
    return tuple(given)


def only(given: Mapping[str, Any], known: set[str], where: str) -> None:
    """Raise ValueError if a table has keys that nothing reads."""
    if unknown := sorted(given.keys() - known):
        raise ValueError(f"expected {', '.join(sorted(known))} in {where}, got {', '.join(unknown)}; leave it out")
