"""The exception tree: what was found, what was needed, what to do, and one exit code each."""

from __future__ import annotations

EXIT_OK = 0
EXIT_DIFFERS = 1
EXIT_CANNOT_RUN = 2
EXIT_BUG = 70
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143


class RepconvError(Exception):
    """A fact that ends the command, told in up to four parts.

    Low layers raise ``found`` (and ``needed``); the boundary that knows the file or the node
    adds ``where`` with :meth:`at`, so no layer has to know what lies above it.

    >>> error = InputError("12 bytes", needed="at least 64", hint="Download it again.")
    >>> str(error.at("model.pt"))
    'model.pt: 12 bytes; needed: at least 64. Download it again.'
    """

    exit_code = EXIT_BUG

    def __init__(
        self, found: str, *, where: str | None = None, needed: str | None = None, hint: str | None = None
    ) -> None:
        self.found = found
        self.where = where
        self.needed = needed
        self.hint = hint
        super().__init__(found)

    def at(self, where: str) -> RepconvError:
        """Return this error with its place filled in, if no nearer place is known already."""
        if self.where is None:
            self.where = where
        return self

    def __str__(self) -> str:
        text = self.found if self.where is None else f"{self.where}: {self.found}"
        if self.needed is not None:
            text += f"; needed: {self.needed}"
        if self.hint is not None:
            text += f"{'' if text.endswith(('.', '?', '!')) else '.'} {self.hint}"
        return text


class InputError(RepconvError):
    """The source, an option or the output path cannot be used as given."""

    exit_code = EXIT_CANNOT_RUN


class DamagedFileError(InputError):
    """A file is cut short, fails its checksum, or contradicts itself."""


class UnsafeFileError(InputError):
    """A file asks for something that could run code, so it is not opened."""


class OutputError(InputError):
    """The output cannot be written there: it exists, is the input, or the disk refuses."""


class NotRunnableError(InputError):
    """Operators do not take the values that they are given, or cannot be computed in float64 here."""


class TraceError(InputError):
    """The model cannot be turned into a graph of tensor operations."""


class InexactError(RepconvError):
    """Two maps cannot be combined into one without changing an output; ``found`` is the reason."""


class UnprovenError(RepconvError):
    """A fused block or graph failed its own certificate: a bug of ours, nothing was written."""
