"""The locals of one function: handed out by type and name, and used again when nobody needs them any more."""

from __future__ import annotations

from collections import Counter

from tinygpt.targets.wasm.assembler import Variable
from tinygpt.targets.wasm.primitives import Code

_REREADABLE = ("local.get", "i32.const", "i64.const", "f32.const")


class Frame:
    """Parameters come first; they are never handed out again. `name` is the stem of a local's name, for reading."""

    def __init__(self) -> None:
        self.variables: list[Variable] = []
        self._parameters = 0
        self._stems: list[str] = []
        self._count: Counter[str] = Counter()
        self._free: dict[tuple[str, str], list[int]] = {}
        self._retired: list[int] = []

    def parameter(self, type: str, name: str) -> int:
        self._parameters += 1
        return self._add(type, name)

    def local(self, type: str, name: str) -> int:
        free = self._free.get((type, name))
        return free.pop() if free else self._add(type, name)

    def release(self, local: int) -> None:
        """Nothing printed after the next `settle` reads this local."""
        if local >= self._parameters:
            self._retired.append(local)

    def settle(self) -> None:
        """What was released may be handed out again."""
        for local in self._retired:
            self._free.setdefault((self.variables[local].type, self._stems[local]), []).append(local)
        self._retired.clear()

    def twice(self, code: Code, type: str) -> tuple[Code, Code]:
        """Code for a first and for further reads of a value that is wanted more than once at one place."""
        if len(code) == 1 and code[0][0] in _REREADABLE:
            return code, code
        local = self.local(type, "twice")
        self.release(local)
        return [*code, ("local.tee", local)], [("local.get", local)]

    def split(self) -> tuple[tuple[Variable, ...], tuple[Variable, ...]]:
        """Parameters, and the other locals."""
        return tuple(self.variables[: self._parameters]), tuple(self.variables[self._parameters :])

    def _add(self, type: str, name: str) -> int:
        self._count[name] += 1
        number = self._count[name]
        self.variables.append(Variable(name if number == 1 else f"{name}.{number}", type))
        self._stems.append(name)
        return len(self.variables) - 1
