"""New tokens on the host: where sequences end, and who is told of each token."""

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cats.generation.settings import Settings


class TokenReader:
    """Reads tokens on the host: on a GPU one step behind, so that the device never waits for the host."""

    def __init__(self, batch: int, settings: Settings, on_tokens: Callable[[Tensor], None] | None) -> None:
        self.padding, self.on_tokens = settings.pad, on_tokens
        self.stop = torch.tensor(sorted(settings.stop), dtype=torch.int64, device="cpu")
        self.ended = torch.zeros(batch, dtype=torch.bool, device="cpu")
        self.lengths = torch.zeros(batch, dtype=torch.int64, device="cpu")
        self.pending: deque[tuple[Tensor, Any]] = deque()
        self.count = 0

    def push(self, token: Tensor) -> bool:
        """Take the next token in; whether all sequences have ended."""
        if token.is_cuda:
            host = torch.empty(token.shape, dtype=token.dtype, device="cpu", pin_memory=True)
            host.copy_(token, non_blocking=True)
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(token.device))
            self.pending.append((host, event))
            return len(self.pending) > 1 and self._read()
        self.pending.append((token.clone(), None))
        return self._read()

    def _read(self) -> bool:
        token, event = self.pending.popleft()
        if event is not None:
            event.synchronize()
        values = torch.where(self.ended, self.padding, token[:, 0])
        self.count += 1
        self.lengths += ~self.ended
        self.ended |= torch.isin(values, self.stop)
        if self.on_tokens:
            self.on_tokens(values)
        return bool(self.ended.all())

    def finish(self) -> int:
        """Read what is pending, unless all sequences have ended; the number of tokens."""
        while self.pending and not bool(self.ended.all()):
            self._read()
        return self.count

    def pad(self, tokens: Tensor) -> None:
        """Put padding after the end of each sequence of new tokens (batch, n)."""
        after = torch.arange(tokens.shape[1]) >= self.lengths[:, None]
        tokens.masked_fill_(after.to(tokens.device), self.padding)
