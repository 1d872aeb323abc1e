"""Read a pickle without unpickling it: its opcodes run on a small machine whose only values are inert records.

``pickletools`` splits the bytes into opcodes and runs none of them. The machine below knows the opcodes that
checkpoints use. Naming a class makes a record of the name; calling something makes a record only for the few
constructors of :mod:`repconv_cli.checkpoint.constructors`, and a refusal for everything else.
"""

from __future__ import annotations

import pickletools
import sys
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from typing import IO, BinaryIO, cast

from repconv_cli.checkpoint.admitted import is_acting
from repconv_cli.checkpoint.constructors import Constructors
from repconv_cli.checkpoint.machine import Machine
from repconv_cli.checkpoint.quoting import listed, quoted
from repconv_cli.checkpoint.records import InstanceRecord
from repconv_cli.errors import DamagedFileError, InputError, RepconvError, UnsafeFileError

MOST_PICKLE_BYTES = 64 << 20
MOST_OPCODES = 1_000_000
"""Steps in all pickles of a file; weights take about 35 for each tensor."""

MOST_TEXT = 1 << 20
"""Characters in one string, bytes in one bytes value, digits in one number."""

# An empty set takes as much memory as four lists, and a name as much time as four of other steps.
_WEIGHT = {"EMPTY_SET": 4, "FROZENSET": 4, "GLOBAL": 4, "STACK_GLOBAL": 4}
_SAVE_AGAIN = "Save model.state_dict() instead, and give --arch file.py:callable."


_NO_PACKAGES = frozenset(("torch", "numpy", "argparse", "builtins", "collections", "__main__", "__torch__"))


def _hint(foreign: Iterable[str]) -> str:
    """Return what to do: save plain weights, or trust the packages that the names are from, if they are installed."""
    packages = dict.fromkeys(path.partition(".")[0] for path in foreign if not is_acting(path))
    others = sys.stdlib_module_names | _NO_PACKAGES
    named = [name for name in packages if name.isidentifier() and name not in others and _is_installed(name)]
    if not named:
        return _SAVE_AGAIN
    trust = " ".join(f"--trust {quoted(name)}" for name in named[:3])
    return f"{_SAVE_AGAIN} {trust} admits the module classes of an installed package."


def _is_installed(package: str) -> bool:
    # Of a name without a dot nothing is imported to find it.
    try:
        return find_spec(package) is not None
    except (ImportError, ValueError):
        return False


class _Bounded:
    """A file that never reads past ``limit`` bytes, whatever length an opcode claims."""

    def __init__(self, handle: BinaryIO, limit: int) -> None:
        self._handle = handle
        self._end = handle.tell() + limit

    def read(self, count: int) -> bytes:
        return self._handle.read(max(0, min(count, self._end - self._handle.tell())))

    def readline(self) -> bytes:
        # A line in a pickle is a name or a number.
        return self._handle.readline(max(0, min(MOST_TEXT, self._end - self._handle.tell())))

    def tell(self) -> int:
        return self._handle.tell()


class PickleReader:
    """The records of one or more pickles of one file, and every reason to refuse them.

    ``trusted`` names packages whose module classes are admitted besides those of ``torch.nn``.
    After reading, ``instances`` lists every module record and ``foreign`` every refused name with what was
    tried, in the order of the file.
    """

    def __init__(self, trusted: Sequence[str] = (), available_bytes: int = 0) -> None:
        self.constructors = Constructors(trusted, available_bytes)
        self.foreign = self.constructors.foreign
        self._opcodes_left = MOST_OPCODES

    @property
    def instances(self) -> list[InstanceRecord]:
        """Return every module record made so far."""
        return self.constructors.instances

    def read(self, handle: BinaryIO, limit: int = MOST_PICKLE_BYTES) -> object:
        """Return what the next pickle of ``handle`` says, as plain values and records.

        What is not admitted becomes a :class:`Foreign` record, which does nothing. Whether it matters is for the
        caller to judge, who knows which part is needed: :meth:`refuse_foreign`.

        Raises:
            UnsafeFileError: it names or calls something that would act on the machine; all such names are listed.
            DamagedFileError: it is not a well-formed pickle.
            InputError: it is larger than any checkpoint needs, or holds tensors that cannot be read.
        """
        machine = Machine(self.constructors)
        try:
            result = self._run(machine, _Bounded(handle, limit))
        except RepconvError:
            self.refuse_foreign()
            raise
        except (ValueError, IndexError, KeyError, TypeError, OverflowError, RecursionError):
            self.refuse_foreign()
            raise DamagedFileError("its pickle is not well-formed", hint="Download or save it again.") from None
        if any(is_acting(path) for path in self.foreign):
            self.refuse_foreign()
        return result

    def refuse_foreign(self) -> None:
        """Raise if anything that is not admitted has been seen.

        Raises:
            UnsafeFileError: listing the names.
        """
        if self.foreign:
            names = [f"{quoted(path)} ({deed})" if deed else path for path, deed in self.foreign.items()]
            raise UnsafeFileError(
                f"the pickle asks for what is not plain weights: {listed(names, limit=200)}",
                needed="tensors, plain values and modules of torch.nn",
                hint=_hint(self.foreign),
            )

    def _run(self, machine: Machine, source: _Bounded) -> object:
        for opcode, argument, _ in pickletools.genops(cast(IO[bytes], source)):
            self._opcodes_left -= _WEIGHT.get(opcode.name, 1)
            if self._opcodes_left < 0:
                raise InputError(f"its pickle has more than {MOST_OPCODES} steps")
            if isinstance(argument, (str, bytes, bytearray)) and len(argument) > MOST_TEXT:
                raise InputError(f"its pickle holds a text of {len(argument)} characters", needed=f"up to {MOST_TEXT}")
            if isinstance(argument, int) and argument.bit_length() > 128:
                raise InputError("its pickle holds a number of more than 128 bits")
            if opcode.name == "STOP":
                return machine.finish()
            machine.step(opcode.name, argument)
        raise ValueError("no STOP")
