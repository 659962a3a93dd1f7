"""Jobs on the CPU with what they take at most: the process' largest resident set, which Linux
alone tells."""

import ctypes
import gc
from collections.abc import Callable, Mapping
from pathlib import Path

from bench.timing import DEVICE, Turns, quartiles, seconds_of

STATUS, REFERENCES = Path("/proc/self/status"), Path("/proc/self/clear_refs")
Run = Callable[[], object]


def nothing() -> None:
    """Undoes a job that leaves nothing behind."""


def in_turns(jobs: Mapping[str, tuple[Run, Run]], rounds: int) -> dict[str, Turns]:
    """Times jobs round by round, each once a round and one of them called "floor". A job comes with
    what undoes it, which is not timed; a first round is to warm up.

    `info` has the ratios to the floor of `take_turns`, and `peak_bytes`: by how much the largest
    resident set of any round exceeds what was resident before; None where the system tells neither.
    """
    found = {name: Turns([], {"device": DEVICE, "peak_bytes": None}) for name in jobs}
    for turn in range(rounds + 1):
        for name, (job, undo) in jobs.items():
            gc.collect()
            before = reset_peak()
            seconds = seconds_of(job)
            after = peak()
            undo()
            if turn:
                found[name].times.append(seconds)
                if before is not None and after is not None:
                    info = found[name].info
                    info["peak_bytes"] = max(info["peak_bytes"] or 0, after - before)
    for turns in found.values():
        turns.info |= quartiles(turns.times, found["floor"].times)
    return found


def reset_peak() -> int | None:
    """Begins a new measurement of the largest resident set; what is resident now, in bytes, or None
    where that cannot be done. Memory that was given back is no longer resident: to take it again
    would look free of cost."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        REFERENCES.write_text("5")
    except (OSError, AttributeError):  # not Linux, or not with glibc
        return None
    return peak()


def peak() -> int | None:
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        return None
    return next((int(x.split()[1]) * 1024 for x in lines if x.startswith("VmHWM")), None)
