"""Values read from JSON: whether they are of the types that their dataclass names."""

from __future__ import annotations

from types import UnionType
from typing import Any, get_origin, get_type_hints


def check_types(made: Any) -> None:
    """Raise `ValueError` where a field of a dataclass holds another type than it declares; True is no number.

    Items of lists and dicts are not looked at.
    """
    for name, hint in get_type_hints(type(made)).items():
        kind = hint if isinstance(hint, UnionType) else get_origin(hint) or hint
        value = getattr(made, name)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ValueError(f"{name} is {value!r}")
