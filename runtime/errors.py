"""What a runtime refuses: `UserError` (the bundle, the file, the data, the device) and `DivergedError` (the run
itself)."""

from __future__ import annotations


class UserError(Exception):
    """Something outside the runtime is wrong. The message names the thing and says what is wrong with it.

    `hint` is the next step; it prints as its own line."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint

    def __str__(self) -> str:
        text = super().__str__()
        return f"{text}\n  hint: {self.hint}" if self.hint else text


class DivergedError(UserError):
    """The loss or the gradient norm is not a finite number: the weights in memory are of no more use."""
