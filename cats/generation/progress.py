"""A line on stderr while something takes long."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

QUIET_SECONDS = 1.0
"""What ends sooner is not worth a line."""


@contextmanager
def progress(doing: str, done: str) -> Iterator[None]:
    """Show ``doing`` and the seconds so far, every second on a terminal; ``done`` and the seconds taken at the end."""
    begin, ended, terminal = time.perf_counter(), threading.Event(), sys.stderr.isatty()

    def show() -> None:
        while not ended.wait(QUIET_SECONDS):
            end = "" if terminal else "\n"
            print(f"\r{doing} ... {time.perf_counter() - begin:.0f} s" if terminal else doing, file=sys.stderr, end=end)
            sys.stderr.flush()
            if not terminal:
                return

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        seconds = time.perf_counter() - begin
        if seconds > QUIET_SECONDS:
            start = "\r\033[K" if terminal else ""
            print(f"{start}{done} in {seconds:.0f} s", file=sys.stderr)
