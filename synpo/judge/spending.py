"""What answers cost, and a budget that is stopped before it is passed."""

import math
from dataclasses import dataclass, field
from typing import NamedTuple


class Usage(NamedTuple):
    """Tokens of one answer, as the server counts them."""

    prompt: int
    completion: int


class BudgetReached(RuntimeError):
    """The next request might pass the budget, so it was not sent."""


@dataclass
class Spending:
    """Totals of a run, and the reservations of requests that are under way.

    Before a request is sent, the most that it can cost is reserved: a token per byte of its text, and all the tokens
    that the answer may have. A request whose reservation would pass the budget is refused. When the answer is in, what
    the server counted replaces the reservation.

    Attributes:
        price_in, price_out: money per million tokens read and written, in any currency.
        budget: the most that all answers may cost, those of earlier runs in the cache included; None: no limit.

    Errors: ValueError for negative amounts, and for a budget without prices.
    """

    price_in: float = 0.0
    price_out: float = 0.0
    budget: float | None = None
    calls: int = 0  # answers paid in this run
    cached: int = 0  # answers that were in the cache
    prompt_tokens: int = 0  # of all answers, earlier runs included
    completion_tokens: int = 0
    without_usage: int = 0  # answers whose tokens the server did not tell: charged with their reservation
    _reserved: float = 0.0
    _unknown: float = field(default=0.0, repr=False)

    def __post_init__(self) -> None:
        for name in ("price_in", "price_out", "budget"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} is {value}; an amount of at least 0 is needed")
        if self.budget is not None and not (self.price_in or self.price_out):
            raise ValueError("a budget needs prices; give price_in and price_out, in money per million tokens")

    @property
    def cost(self) -> float:
        """Money for all answers, earlier runs included."""
        return self._price(self.prompt_tokens, self.completion_tokens) + self._unknown

    def reserve(self, prompt_bytes: int, max_tokens: int) -> float:
        """Set aside the most that a request can cost. Errors: BudgetReached."""
        most = self._price(prompt_bytes, max_tokens)
        if self.budget is not None and self.cost + self._reserved + most > self.budget:
            under_way = f", {self._reserved:.4f} under way" if self._reserved else ""
            raise BudgetReached(
                f"the budget of {self.budget:g} is used up: {self.cost:.4f} spent{under_way}, and the next request may "
                f"cost {most:.4f}; nothing is lost: run again with a larger budget to go on"
            )
        self._reserved += most
        return most

    def release(self, reserved: float) -> None:
        """A request that brought no answer."""
        self._reserved -= reserved

    def settle(self, reserved: float, usage: Usage | None) -> None:
        """An answer came in; usage None: the server told no numbers."""
        self._reserved -= reserved
        self.calls += 1
        if usage is None:
            self.without_usage += 1
            self._unknown += reserved
        else:
            self.add_earlier(usage)

    def add_earlier(self, usage: Usage) -> None:
        """Count tokens; by itself, those of answers that earlier runs paid."""
        self.prompt_tokens += usage.prompt
        self.completion_tokens += usage.completion

    def __str__(self) -> str:
        tokens = f"{self.prompt_tokens:,} tokens read, {self.completion_tokens:,} written"
        money = f", cost {self.cost:.4f}" if self.price_in or self.price_out else ""
        untold = f"; {self.without_usage} answers without token counts" if self.without_usage else ""
        return f"{self.calls} answers paid, {self.cached} from the cache; in all {tokens}{money}{untold}"

    def _price(self, prompt: float, completion: float) -> float:
        return (prompt * self.price_in + completion * self.price_out) / 1e6
