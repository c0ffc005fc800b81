"""The two kinds of failure: `UserError` (the model, the config, the file, the device) and `CompilerBug` (ours)."""

from __future__ import annotations


class UserError(Exception):
    """Something outside the compiler is wrong. The message says what, where, and what to do next.

    `hint` is the next step; it prints as its own line."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint

    def __str__(self) -> str:
        text = super().__str__()
        return f"{text}\n  hint: {self.hint}" if self.hint else text


class CompilerBug(Exception):
    """The compiler broke one of its own rules. `after` names the pass that left the module in that state."""

    def __init__(self, message: str, *, after: str = "") -> None:
        super().__init__(f"{message}\n  first seen after pass {after}" if after else message)
