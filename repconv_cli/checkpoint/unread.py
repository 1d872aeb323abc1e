"""A stand-in for an object in a checkpoint's module that is not read: any use of it is an error.

A module that never uses the object works; one that does says so, instead of computing something else.
"""

from __future__ import annotations

from typing import Any, NoReturn

from repconv_cli.checkpoint.quoting import quoted
from repconv_cli.errors import InputError


class Unread:
    """Stands for an object of the class ``path``, of which nothing was made.

    >>> config = Unread("argparse.Namespace")
    >>> config is None
    False
    >>> config.width
    Traceback (most recent call last):
    repconv_cli.errors.InputError: the model uses a argparse.Namespace, which is not read from a checkpoint. ...
    """

    __slots__ = ("_unread_path",)
    __hash__ = object.__hash__

    def __init__(self, path: str) -> None:
        object.__setattr__(self, "_unread_path", path)

    def __getattr__(self, name: str) -> Any:
        # Copying and inspecting ask for such names, and take no for an answer.
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        _refuse(self)

    def __setattr__(self, name: str, value: Any) -> None:
        _refuse(self)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """Raise :class:`InputError`, as every other use does."""
        _refuse(self)

    def __bool__(self) -> bool:
        _refuse(self)

    def __len__(self) -> int:
        _refuse(self)

    def __iter__(self) -> Any:
        _refuse(self)

    def __getitem__(self, key: Any) -> Any:
        _refuse(self)

    def __contains__(self, key: Any) -> bool:
        _refuse(self)

    def __eq__(self, other: object) -> bool:
        return self is other or _refuse(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Unread:
        return self

    def __repr__(self) -> str:
        return f"<{quoted(self._unread_path)}, not read>"


def _refuse(unread: Unread) -> NoReturn:
    raise InputError(
        f"the model uses a {quoted(unread._unread_path)}, which is not read from a checkpoint",
        hint="Save model.state_dict() instead, and give --arch file.py:callable.",
    )
