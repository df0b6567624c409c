"""Turn a parser's complaint into one that names the key, the value and the nearest valid key."""

import difflib
import inspect
import re
from collections.abc import Iterable, Mapping
from typing import Any

from lightning_apps.errors import UserError

_CLASS_PATH = re.compile(r"Problem with given class_path '([^']+)'")
_NOT_ACCEPTED = re.compile(r"Option '([^']+)' is not accepted")
_PARSER_KEY = re.compile(r"Parser key \"([^\"]+)\"")
_EXPECTED = re.compile(r"Expected an? ([^\n]+?)(?:\. Got value: ([^\n]+))?$", re.MULTILINE)
_GIVEN = re.compile(r"Given value: ([^\n]+)")
_UNKNOWN_OPTION = re.compile(r"does not accept option '([^']+)'")
_UNRECOGNIZED = re.compile(r"unrecognized arguments: (.+)")
_EXPLAINED = re.compile(r"- ([\w.]+: expected [^\n]+, got '[^\n]*')$", re.MULTILINE)
_INCOMPLETE = re.compile(
    r"- ([\w.]+): expected dict, got \"Namespace\(class_path='([^']+)', init_args=Namespace\((.*?)\)\)\""
)
_NESTED_VALUE = re.compile(r"NestedArg\(key='([^']*)', val='?([^']*)'?\)")


def nearest(key: str, known: Iterable[str]) -> str:
    """` Nearest valid key: ...`, or the valid keys where none is near."""
    known = sorted(set(known))
    prefix, _, last = key.rpartition(".")
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if not close:
        tails = {name.rpartition(".")[2]: name for name in known}
        close = [tails[name] for name in difflib.get_close_matches(last, tails, n=1, cutoff=0.6)]
    if close:
        return f" Nearest valid key: {close[0]}"
    siblings = [name for name in known if not prefix or name.startswith(prefix)]
    return f" Valid keys: {', '.join(siblings[:40])}" if siblings else ""


def init_arguments(class_path: str) -> list[str]:
    """Names of the arguments a class takes; empty where it cannot be imported."""
    module, _, name = class_path.rpartition(".")
    try:
        cls: Any = getattr(__import__(module, fromlist=[name]), name)
        names = [parameter for parameter in inspect.signature(cls).parameters if parameter != "self"]
        for parent in cls.__mro__[1:]:
            if "kwargs" in names and "__init__" in vars(parent):
                names += list(inspect.signature(parent.__init__).parameters)
    except (ImportError, AttributeError, ValueError, TypeError):
        return []
    return [parameter for parameter in names if parameter not in ("self", "args", "kwargs")]


def missing_arguments(class_path: str, given: str) -> list[str]:
    """Names of the arguments without default that are None in `name=value, ...`."""
    module, _, name = class_path.rpartition(".")
    parameters = inspect.signature(getattr(__import__(module, fromlist=[name]), name)).parameters.values()
    required = [one.name for one in parameters if one.default is one.empty and one.kind == one.POSITIONAL_OR_KEYWORD]
    return [name for name in required if re.search(rf"\b{name}=None\b", given)]


def explain(message: str, known: Iterable[str], class_paths: Mapping[str, str] | None = None) -> UserError:
    """The parser's complaint as an error a person can act on.

    Args:
        message: What the parser said.
        known: All valid dotted keys.
        class_paths: Key -> class path that the configuration has there.
    """
    unknown = _UNKNOWN_OPTION.search(message)
    if unknown:
        return UserError(f"unknown key '{unknown[1]}' in the configuration.{nearest(unknown[1], known)}")
    unrecognized = _UNRECOGNIZED.search(message)
    if unrecognized:
        option, _, value = unrecognized[1].replace("=", " ", 1).partition(" ")
        key = option.lstrip("-")
        shown = f" (value {value})" if value else ""
        return UserError(f"unknown option --{key}{shown}.{nearest(key, known)}")
    keys = _PARSER_KEY.findall(message)
    place = keys[0] if keys else "configuration"
    named, option = _CLASS_PATH.search(message), _NOT_ACCEPTED.search(message)
    class_path = named[1] if named else (class_paths or {}).get(place)
    if class_path and option:
        key = f"{place}.{option[1]}"
        near = nearest(key, [f"{place}.{name}" for name in init_arguments(class_path)])
        return UserError(f"unknown key '{key}': {class_path} takes no '{option[1]}'.{near}")
    explained = _EXPLAINED.search(message)
    if explained:
        return UserError(f"{place}.{explained[1]}")
    incomplete = _INCOMPLETE.search(message)
    missing = missing_arguments(incomplete[2], incomplete[3]) if incomplete else []
    if missing:
        return UserError(f"{place}.{incomplete[1]}.{missing[0]}: {incomplete[2]} needs a value for it")
    expected = [found for found in _EXPECTED.findall(message) if "NoneType" not in found[0]]
    if expected:
        given = _GIVEN.search(message)
        nested = _NESTED_VALUE.search(given[1]) if given else None
        value = next((found[1] for found in expected if found[1]), None)
        value = value or (nested[2] if nested else given[1] if given else "?")
        key = ".".join(dict.fromkeys(keys)) if keys else place
        if nested and nested[1] not in key:
            key = f"{key}.{nested[1]}"
        types = " or ".join(dict.fromkeys(found[0] for found in expected))
        return UserError(f"{key}: expected {_plain_types(types)}, got {value!r}")
    if named:
        detail = message.split(named[0], 1)[1].lstrip("':\n ").splitlines()[0].strip()
        return UserError(f"{place}.class_path: {named[1]}: {detail}")
    return UserError(message.strip())


def _plain_types(text: str) -> str:
    return re.sub(r"<class '(?:builtins\.)?([^']+)'>", r"\1", text)


def class_paths_of(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Dotted key -> class path of everything in a configuration that names one."""
    found: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            name = f"{prefix}{key}"
            if isinstance(value.get("class_path"), str):
                found[name] = value["class_path"]
            found |= class_paths_of(value, f"{name}.")
    return found
