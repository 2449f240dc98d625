"""What a run may spend, over all sessions of its journal: requests, tokens, dollars."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from inranker_jax.errors import InputError
from inranker_jax.query_generation.journal import Spent


@dataclass
class Budget:
    """Counts requests and tokens against limits; safe to share between threads.

    A request starts only when its largest possible cost still fits, so the limits hold as far as the estimate of a
    prompt's length does.

    Attributes:
      requests, tokens, usd: the limits; None for none.
      prices: dollars for a million prompt and completion tokens.
      spent: over all sessions so far.
      exhausted: a limit kept a request from being sent; which one.
    """

    requests: int | None = None
    tokens: int | None = None
    usd: float | None = None
    prices: tuple[float, float] | None = None
    spent: Spent = field(default_factory=Spent)
    exhausted: str = ""
    _reserved: list[int] = field(default_factory=lambda: [0, 0], repr=False)
    _sent: int = field(default=0, repr=False)  # requests sent by this session and not yet in `spent`
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def __post_init__(self) -> None:
        if self.usd is not None and self.prices is None:
            raise InputError(
                "--budget_usd needs prices: give --usd_per_million_tokens=PROMPT,COMPLETION (dollars for a million)."
            )

    def reserve(self, prompt_tokens: int, completion_tokens: int) -> bool:
        """Sets the largest cost of one answer aside; False when it does not fit."""
        with self._lock:
            prompt = self.spent.prompt_tokens + self._reserved[0] + prompt_tokens
            completion = self.spent.completion_tokens + self._reserved[1] + completion_tokens
            limit = ""
            if self.requests is not None and self.spent.requests + self._sent + 1 > self.requests:
                limit = f"{self.requests} requests"
            elif self.tokens is not None and prompt + completion > self.tokens:
                limit = f"{self.tokens} tokens"
            elif self.usd is not None and self.prices is not None:
                dollars = (prompt * self.prices[0] + completion * self.prices[1]) / 1e6
                limit = f"${self.usd:g}" if dollars > self.usd else ""
            self.exhausted = limit
            if limit:
                return False
            self._reserved[0] += prompt_tokens
            self._reserved[1] += completion_tokens
            self._sent += 1
            return True

    def another(self) -> bool:
        """Whether one more attempt at a request fits the number of requests; counts it."""
        with self._lock:
            if self.requests is not None and self.spent.requests + self._sent + 1 > self.requests:
                self.exhausted = f"{self.requests} requests"
                return False
            self._sent += 1
            return True

    def release(self, prompt_tokens: int, completion_tokens: int, attempts: int) -> None:
        """Gives back what `reserve` set aside and the attempts counted, once the answer is about to be journaled."""
        with self._lock:
            self._reserved[0] -= prompt_tokens
            self._reserved[1] -= completion_tokens
            self._sent -= attempts


class BudgetSpent(Exception):
    """One more request for this prompt does not fit the budget."""


@dataclass
class Tally:
    """Counts every request that is sent for one prompt, for whatever reason.

    Attributes:
      budget: the first request was reserved there; every other is added.
      sent: requests so far.
    """

    budget: Budget
    sent: int = 0

    def take(self) -> None:
        """Counts a request that is about to be sent.

        Raises:
          BudgetSpent: it must not be sent.
        """
        if self.sent and not self.budget.another():
            raise BudgetSpent
        self.sent += 1
