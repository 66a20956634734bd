"""Progress inside an evaluation: how many items of each task are done, a line on stderr every half minute."""

import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from typing import Any

from tqdm import tqdm

SECONDS = 30.0
"""Between two lines; an evaluation that takes less shows none."""


def show(text: str) -> None:
    """A line on stderr, above the progress bars."""
    tqdm.write(text, file=sys.stderr)


class ItemsDone:
    """lm-eval's ``cache_hook`` of a model: it is given each answer, and counts an item whose requests all have theirs.

    lm-eval puts the requests of all tasks together and sorts them by length, so that all tasks advance at once:
    ``items done: arc_easy 120/400, piqa 80/200``.

    Args:
        requests: lm-eval's.
        write: what takes a line.
        clock: seconds.
    """

    def __init__(
        self,
        requests: Iterable[Any],
        write: Callable[[str], None] = show,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.write, self.clock = write, clock
        self.items: dict[tuple[str, ...], list[tuple[str, Any]]] = defaultdict(list)
        self.left: Counter[tuple[str, Any]] = Counter()
        for request in requests:
            item = request.task_name, request.doc_id
            self.items[_texts(request.args)].append(item)
            self.left[item] += 1
        self.totals = Counter(task for task, _ in self.left)
        self.done = dict.fromkeys(self.totals, 0)
        self.last = clock()

    def add_partial(self, _kind: str, request: Iterable[Any], _answer: Any) -> None:
        """Called by lm-eval with each answer; requests of the same text are taken one after the other."""
        waiting = self.items.get(_texts(request))
        if not waiting:
            return
        item = waiting.pop()
        self.left[item] -= 1
        if not self.left[item]:
            self.done[item[0]] += 1
        now = self.clock()
        if now - self.last >= SECONDS:
            self.last = now
            self.write(f"items done: {', '.join(f'{task} {self.done[task]}/{n}' for task, n in self.totals.items())}")


def _texts(arguments: Iterable[Any]) -> tuple[str, ...]:
    """What tells a request from others: its context, and its continuation where it has one."""
    return tuple(argument for argument in arguments if isinstance(argument, str))
