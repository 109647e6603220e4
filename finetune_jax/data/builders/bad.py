"""What becomes of a record that cannot be used."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from finetune_jax.errors import UserError

T = TypeVar("T")


@dataclass
class BadRecords:
    """Raises for the first one, or leaves out so many; the others keep their order."""

    policy: Literal["fail", "skip"] = "fail"
    limit: int = 0
    """Most that are left out of one data set."""
    found: list[str] = field(default_factory=list)
    """What was wrong with those left out, each with its place."""

    def met(self, error: UserError) -> None:
        """Takes note of a bad record.

        Raises:
            UserError: The policy is fail, or there are too many.
        """
        if self.policy == "fail":
            raise error
        self.found.append(str(error))
        if len(self.found) > self.limit:
            raise UserError(
                f"{len(self.found)} records cannot be used, over data.max-bad-records {self.limit}; one of them: {error}"
            ) from error

    def attempt(self, function: Callable[[], T]) -> T | None:
        """What the function gives; None for a record that is left out."""
        try:
            return function()
        except UserError as error:
            self.met(error)
            return None
