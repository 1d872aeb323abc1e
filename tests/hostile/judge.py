"""What must hold of every run of the command, whatever the file: measured and checked."""

from __future__ import annotations

import hashlib
import re
import resource
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from tests.cli.runs import run
from tests.hostile.case import ARCHITECTURE, MARKER, Case

MOST_SECONDS = 10
"""Of work: other processes on the machine may make it longer by the clock."""

MOST_MEGABYTES = 300
_LONGEST_LINE = 2000
_UNSAFE_ADVICE = re.compile("weights_only|safe_globals|unsafe|--trust", re.IGNORECASE)
_PHASE = re.compile(r"[A-Z][a-z]+ …( \d+ of \d+,)?( \d+ s)?")


class TooSlowError(BaseException):
    """Raised inside a run that takes too long; no handler of ours or of torch's may swallow it."""


@dataclass
class Outcome:
    """How a run went, and what was wrong with it."""

    code: int = -1
    message: str = ""
    output: str = ""
    seconds: float = 0.0
    megabytes: float = 0.0
    wrong: list[str] = field(default_factory=list)

    @property
    def is_refused(self) -> bool:
        return self.code == 2


def judge(source: Path, out: Path, *options: object) -> Outcome:
    """Fuse ``source`` into ``out``, alone in its folder, and check all that must hold of any run.

    What was fused is verified from the two files.
    """
    found = _judged("fuse", source, out, *options)
    if found.code == 0:
        verified = _judged("verify", source, out, *options)
        found.wrong += verified.wrong
        if verified.code != 0:
            found.wrong.append(f"verify ends with exit code {verified.code}: {verified.message}")
    return found


def _judged(command: str, source: Path, out: Path, *options: object) -> Outcome:
    before, found = _state(source.parent), Outcome()
    start, peak = time.process_time(), PeakMemory()
    with at_most(MOST_SECONDS):
        try:
            done = run(command, source, out, *options)
        except TooSlowError:
            found.wrong.append(f"it took more than {MOST_SECONDS} s")
            return found
    found.seconds, found.megabytes = time.process_time() - start, peak.megabytes()
    if found.seconds > MOST_SECONDS:
        found.wrong.append(f"it took {found.seconds:.0f} s")
    found.code, found.output = done.exit_code, done.output
    found.message = "\n".join(line for line in done.stderr.splitlines() if not _PHASE.fullmatch(line))
    found.wrong += _wrong_with_text(found, done.stdout)
    if found.megabytes > MOST_MEGABYTES:
        found.wrong.append(f"it took {found.megabytes:.0f} MB")
    if _state(source.parent) != before:
        found.wrong.append("a file beside the source came, went or changed")
    if [path.name for path in out.parent.iterdir()] != ([out.name] if found.code == 0 or command == "verify" else []):
        found.wrong.append("the folder of the output holds something else than a finished output")
    return found


def _wrong_with_text(found: Outcome, stdout: str) -> Iterator[str]:
    if found.code not in (0, 2):
        yield f"exit code {found.code}"
    if "Traceback" in found.output:
        yield "a traceback"
    if not all(line.isprintable() for line in found.output.split("\n")):
        yield "control characters"
    if found.code == 2:
        if stdout or found.message.count("\n") or not found.message.startswith("error: "):
            yield "a refusal that is not one line"
        if len(found.message) > _LONGEST_LINE:
            yield f"a line of {len(found.message)} characters"
        if _UNSAFE_ADVICE.search(found.message.replace("unsafe name", "")):
            yield "advice to load unsafely"


def options_for(case: Case, folder: Path) -> tuple[str, ...]:
    """Return the options that a case needs, writing the architecture into ``folder``."""
    if not case.needs_architecture:
        return ()
    path = folder / "arch.py"
    path.write_text(ARCHITECTURE)
    return ("--arch", f"{path}:make", "--input", "2,1,8,8")


def _state(folder: Path) -> dict[str, str]:
    """Return the digest of every file in ``folder``; the marker must never be among them."""
    assert not (folder / MARKER).exists(), "code from the file has run"
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if path.is_file() and path.suffix != ".pyc"
    }


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Raise :class:`TooSlowError` inside the block once it has worked for longer."""

    def stop(_: int, __: FrameType | None) -> None:
        raise TooSlowError

    earlier = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, earlier)


class PeakMemory:
    """The most memory that was in use since this was made, above what was in use then."""

    def __init__(self) -> None:
        # Linux can forget the peak so far; elsewhere only a new peak is seen.
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        self._start = _peak_kilobytes()

    def megabytes(self) -> float:
        return max(0, _peak_kilobytes() - self._start) / 1024


def _peak_kilobytes() -> int:
    with suppress(OSError):
        found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
        if found:
            return int(found[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // 1024 if sys.platform == "darwin" else peak
