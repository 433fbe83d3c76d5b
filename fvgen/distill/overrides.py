"""Settings as text: ``NAME=VALUE``, read as the type of the field."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from fvgen.distill.classifier import ClassifierConfig
from fvgen.distill.settings import TrainSettings
from fvgen.utils.errors import UserError

# what the plan of a run hangs on has options of its own, and the head's input is the teacher's
_FIXED = ("recipe", "run", "stages", "iterations", "batch", "micro_batch", "head", "head.in_channels")


def setting_types() -> dict[str, Any]:
    """Type of every setting that can be given as text, by name; those of the classifier's head as ``head.NAME``."""
    own, head = get_type_hints(TrainSettings), get_type_hints(ClassifierConfig)
    known = {f.name: own[f.name] for f in fields(TrainSettings)}
    known |= {f"head.{f.name}": head[f.name] for f in fields(ClassifierConfig)}
    return {name: known[name] for name in sorted(known) if name not in _FIXED}


def override(settings: TrainSettings, texts: Sequence[str]) -> TrainSettings:
    """The settings with each ``NAME=VALUE`` taken over.

    Raises:
        UserError: an unknown name, or a value of another type or out of range.
    """
    known = setting_types()
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--set takes NAME=VALUE, got {text!r}")
        if name not in known:
            raise UserError(f"there is no setting {name!r} for --set; choose one of {', '.join(known)}")
        try:
            found = _read(known[name], value)
        except ValueError:
            raise UserError(f"--set {name} takes {_words(known[name])}, got {value!r}") from None
        part, dot, inner = name.partition(".")
        try:
            settings = replace(settings, **{part: replace(settings.head, **{inner: found}) if dot else found})
        except ValueError as error:  # of the head
            raise UserError(f"--set {name}: {error}") from None
    return settings


def _read(kind: Any, text: str) -> Any:
    if isinstance(kind, UnionType):
        (inner,) = (k for k in get_args(kind) if k is not NoneType)
        return None if text == "none" else _read(inner, text)
    if get_origin(kind) is tuple:
        types = get_args(kind)
        parts = text.split(",")
        if types[-1] is not Ellipsis and len(parts) != len(types):
            raise ValueError
        return tuple(_read(types[0], part) for part in parts)
    if kind is bool:
        return {"true": True, "false": False}[text] if text in ("true", "false") else _no()
    value = kind(text)
    if kind is float and value - value != 0:  # NaN and infinity
        raise ValueError
    return value


def _no() -> bool:
    raise ValueError


def _words(kind: Any) -> str:
    if isinstance(kind, UnionType):
        return " or ".join("none" if k is NoneType else _words(k) for k in get_args(kind))
    if get_origin(kind) is tuple:
        types = get_args(kind)
        return f"{'any number of' if types[-1] is Ellipsis else len(types)} values with commas between them"
    return {float: "a number", int: "a whole number", bool: "true or false", str: "a word"}[kind]
