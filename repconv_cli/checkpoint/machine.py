"""The small machine that a pickle's opcodes run on: a stack and a memo of inert records."""

from __future__ import annotations

from collections.abc import Callable

from repconv_cli.checkpoint.admitted import OLD_MODULES
from repconv_cli.checkpoint.constructors import Constructors
from repconv_cli.checkpoint.quoting import quoted
from repconv_cli.checkpoint.records import RECORDS, Foreign, GlobalName
from repconv_cli.errors import InputError, UnsafeFileError

_MARK = object()
_LONGEST_KEY = 25
"""Parts of a tuple that is a key."""


class Machine:
    """The stack and memo of one pickle.

    A malformed pickle raises ``ValueError``, ``IndexError``, ``KeyError`` or ``TypeError``; the reader above
    turns them into a sentence.
    """

    def __init__(self, constructors: Constructors) -> None:
        self._stack: list[object] = []
        self._memo: dict[int, object] = {}
        self._constructors = constructors

    def step(self, name: str, argument: object) -> None:
        """Run one opcode, given by its name in ``pickletools`` and its decoded argument."""
        if name in _PUSHES_ARGUMENT:
            self._stack.append(argument)
        elif name in _CONSTANTS:
            self._stack.append(_CONSTANTS[name]())
        elif name in _IGNORED:
            return
        elif name in _ACTIONS:
            _ACTIONS[name](self, argument)
        else:
            raise UnsafeFileError(f"its pickle uses the opcode {quoted(name)}, which plain checkpoints never need")

    def finish(self) -> object:
        """Return the one value that is left on the stack."""
        result = self._pop()
        if self._stack:
            raise ValueError("values left over")
        return result

    def _pop(self) -> object:
        value = self._stack.pop()
        if value is _MARK:
            raise ValueError("a mark where a value was needed")
        return value

    def _pop_to_mark(self) -> list[object]:
        for index in range(len(self._stack) - 1, -1, -1):
            if self._stack[index] is _MARK:
                items = self._stack[index + 1 :]
                del self._stack[index:]
                return items
        raise ValueError("no mark")

    def _top(self) -> object:
        value = self._stack[-1]
        if value is _MARK:
            raise ValueError("a mark where a value was needed")
        return value

    def mark(self, _: object) -> None:
        """Open a group."""
        self._stack.append(_MARK)

    def pop(self, _: object) -> None:
        """Drop the top value."""
        self._stack.pop()

    def pop_mark(self, _: object) -> None:
        """Drop a group."""
        self._pop_to_mark()

    def duplicate(self, _: object) -> None:
        """Push the top value again."""
        self._stack.append(self._top())

    def put(self, index: object) -> None:
        """Remember the top value under ``index``."""
        # A memo is a dict here, so that a huge index costs no more than a small one.
        self._memo[_integer(index)] = self._top()

    def memoize(self, _: object) -> None:
        """Remember the top value under the next free index."""
        self._memo[len(self._memo)] = self._top()

    def get(self, index: object) -> None:
        """Push what is remembered under ``index``."""
        self._stack.append(self._memo[_integer(index)])

    def tuple_of_mark(self, _: object) -> None:
        """Push a group as a tuple."""
        self._stack.append(tuple(self._pop_to_mark()))

    def tuple_of(self, count: int) -> None:
        """Push the top ``count`` values as a tuple."""
        items = [self._pop() for _ in range(count)]
        self._stack.append(tuple(reversed(items)))

    def list_of_mark(self, _: object) -> None:
        """Push a group as a list."""
        self._stack.append(self._pop_to_mark())

    def dict_of_mark(self, _: object) -> None:
        """Push a group of keys and values as a dict."""
        items = self._pop_to_mark()
        target: dict[object, object] = {}
        _set_items(target, items)
        self._stack.append(target)

    def frozenset_of_mark(self, _: object) -> None:
        """Push a group as a set."""
        items = self._pop_to_mark()
        self._stack.append({_key(item) for item in items})

    def append(self, _: object) -> None:
        """Add the top value to the list below it."""
        item = self._pop()
        _extend(self._top(), [item])

    def appends(self, _: object) -> None:
        """Add a group to the list below it."""
        items = self._pop_to_mark()
        _extend(self._top(), items)

    def set_item(self, _: object) -> None:
        """Set one item of the dict below it."""
        value, key = self._pop(), self._pop()
        _set_items(self._top(), [key, value])

    def set_items(self, _: object) -> None:
        """Set a group of items of the dict below it."""
        items = self._pop_to_mark()
        _set_items(self._top(), items)

    def add_items(self, _: object) -> None:
        """Add a group to the set below it."""
        items = self._pop_to_mark()
        target = self._top()
        if isinstance(target, set):
            target.update(_key(item) for item in items)
        elif not isinstance(target, Foreign):
            raise ValueError("not a set")

    def name_global(self, argument: object) -> None:
        """Push what a name in the opcode stands for."""
        module, _, name = str(argument).partition(" ")
        self._push_name(module, name)

    def name_from_stack(self, _: object) -> None:
        """Push what the two texts on top name."""
        name, module = self._pop(), self._pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise ValueError("a global named by something else than text")
        self._push_name(module, name)

    def _push_name(self, module: str, name: str) -> None:
        named = GlobalName(OLD_MODULES.get(module, module), name)
        self._stack.append(self._constructors.named(named))

    def call(self, _: object) -> None:
        """Push the record of a call, or its refusal."""
        arguments, function = self._pop(), self._pop()
        if not isinstance(arguments, tuple):
            raise ValueError("arguments that are not a tuple")
        self._stack.append(self._constructors.called(function, arguments))

    def make_empty(self, _: object) -> None:
        """Push the record of an object made without calling its class."""
        arguments, kind = self._pop(), self._pop()
        self._stack.append(self._constructors.made(kind, arguments))

    def make_empty_with_keywords(self, _: object) -> None:
        """Do as :meth:`make_empty`; keywords are arguments too."""
        keywords, arguments, kind = self._pop(), self._pop(), self._pop()
        self._stack.append(self._constructors.made(kind, (arguments, keywords) if keywords else arguments))

    def instance_by_name(self, argument: object) -> None:
        """Push the record of a call of the class named in the opcode."""
        arguments = self._pop_to_mark()
        self.name_global(argument)
        self._stack.append(self._constructors.called(self._pop(), tuple(arguments)))

    def instance_of_mark(self, _: object) -> None:
        """Push the record of a call of a group's first value with the others."""
        kind, *arguments = self._pop_to_mark()
        self._stack.append(self._constructors.called(kind, tuple(arguments)))

    def build(self, _: object) -> None:
        """Give the object below the top the state on top."""
        state = self._pop()
        self._constructors.given_state(self._top(), state)

    def persistent(self, _: object) -> None:
        """Push the storage that the id on top refers to."""
        self._stack.append(self._constructors.persistent(self._pop()))


def _integer(value: object) -> int:
    if not isinstance(value, int) or value < 0:
        raise ValueError("not an index")
    return value


def _key(value: object) -> object:
    """Return ``value`` if hashing and showing it are cheap: nested tuples could make them exponential.

    Records hash by identity.
    """
    parts = value if isinstance(value, tuple) else (value,)
    if len(parts) > _LONGEST_KEY or not all(
        part is None or isinstance(part, (str, bytes, int, float, bool, *RECORDS)) for part in parts
    ):
        raise InputError("its pickle uses something else than plain text or numbers as a key")
    return value


def _extend(target: object, items: list[object]) -> None:
    if isinstance(target, list):
        target.extend(items)
    elif not isinstance(target, Foreign):
        raise ValueError("not a list")


def _set_items(target: object, items: list[object]) -> None:
    if isinstance(target, Foreign):
        return
    if not isinstance(target, dict) or len(items) % 2:
        raise ValueError("not a dict, or a key without a value")
    for key, value in zip(items[::2], items[1::2], strict=True):
        target[_key(key)] = value


_PUSHES_ARGUMENT = frozenset(
    ("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING")
) | frozenset(
    (
        "SHORT_BINSTRING",
        "UNICODE",
        "BINUNICODE",
        "SHORT_BINUNICODE",
        "BINUNICODE8",
        "BINBYTES",
        "SHORT_BINBYTES",
        "BINBYTES8",
    )
)
_IGNORED = frozenset(["PROTO", "FRAME"])
_CONSTANTS: dict[str, Callable[[], object]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_TUPLE": tuple,
    "EMPTY_SET": set,
}
_ACTIONS: dict[str, Callable[[Machine, object], None]] = {
    "MARK": Machine.mark,
    "POP": Machine.pop,
    "POP_MARK": Machine.pop_mark,
    "DUP": Machine.duplicate,
    "PUT": Machine.put,
    "BINPUT": Machine.put,
    "LONG_BINPUT": Machine.put,
    "MEMOIZE": Machine.memoize,
    "GET": Machine.get,
    "BINGET": Machine.get,
    "LONG_BINGET": Machine.get,
    "TUPLE": Machine.tuple_of_mark,
    "TUPLE1": lambda machine, _: machine.tuple_of(1),
    "TUPLE2": lambda machine, _: machine.tuple_of(2),
    "TUPLE3": lambda machine, _: machine.tuple_of(3),
    "LIST": Machine.list_of_mark,
    "DICT": Machine.dict_of_mark,
    "FROZENSET": Machine.frozenset_of_mark,
    "APPEND": Machine.append,
    "APPENDS": Machine.appends,
    "SETITEM": Machine.set_item,
    "SETITEMS": Machine.set_items,
    "ADDITEMS": Machine.add_items,
    "GLOBAL": Machine.name_global,
    "STACK_GLOBAL": Machine.name_from_stack,
    "REDUCE": Machine.call,
    "NEWOBJ": Machine.make_empty,
    "NEWOBJ_EX": Machine.make_empty_with_keywords,
    "INST": Machine.instance_by_name,
    "OBJ": Machine.instance_of_mark,
    "BUILD": Machine.build,
    "BINPERSID": Machine.persistent,
}
