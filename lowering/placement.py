"""Where every value of a fused function lies: which buffer, and how.

Views become addresses. A value that is concatenated or packed is computed straight into its place; a value that is
later reshaped in a way its natural order does not allow is stored in the order that does. What no address can express
is listed as a copy."""

from __future__ import annotations

from dataclasses import dataclass

from tinygpt.ir.core import Function, Op, Value
from tinygpt.ir.ops import OPS
from tinygpt.ir.ops.movement import ViewOp
from tinygpt.ir.storage import Strided
from tinygpt.ir.types import TensorType


@dataclass(frozen=True, eq=False)
class Root:
    """One buffer. `value` is set when it is a function input or a module parameter."""

    type: TensorType
    value: Value | None = None


@dataclass(frozen=True)
class Place:
    root: Root
    storage: Strided


class Placement:
    """Places for the values of a function, decided on demand, producers before consumers."""

    def __init__(self, function: Function, parameters: dict[Value, str]) -> None:
        self.function = function
        self.made = {r: op for op in function.body.ops for r in op.results}
        self.users: dict[Value, list[Op]] = {}
        for op in function.body.ops:
            for v in op.operands:
                self.users.setdefault(v, []).append(op)
        self.places: dict[Value, Place] = {}
        self.roots: dict[Value, Root] = {}
        for value in (*function.params, *parameters):
            self.roots[value] = Root(value.type, value)
            self.places[value] = Place(self.roots[value], Strided.dense(value.type.shape))
        state = {name: v for v, name in parameters.items()}
        for name, update in function.updates.items():
            if self.may_overwrite(state[name], update):
                self.places[update] = self.places[state[name]]

    def may_overwrite(self, state: Value, update: Value) -> bool:
        """Whether the update may be written over the state it replaces: nobody reads the old value afterwards.

        The group that makes it may read it itself if it is pointwise over the same flat elements."""
        maker = self.made.get(update)
        if maker is None or list(self.function.updates.values()).count(update) > 1:
            return False
        readers = self.readers(state)
        if maker.name == "group" and maker.attrs["kind"] == "pointwise":
            order = {op: i for i, op in enumerate(self.function.body.ops)}
            return all(order[r] <= order[maker] for r in readers) and (maker not in readers or state in maker.operands)
        return not readers

    def readers(self, value: Value) -> list[Op]:
        """Groups that read a value or a view of it."""
        found = []
        for user in self.users.get(value, []):
            found += [user] if user.name == "group" else [r for v in user.results for r in self.readers(v)]
        return found

    def place(self, value: Value) -> Place | None:
        """The place of a value; None for a view that its operand's place cannot express."""
        if value in self.places:
            return self.places[value]
        op = self.made[value]
        definition = OPS.get(op.name)
        found: Place | None
        if not isinstance(definition, ViewOp):
            found = self.best_place(value)
        elif len(op.operands) == 1 and op.name != "pack":
            source = self.place(op.operands[0])
            storage = source and definition.view(source.storage, dict(op.attrs))
            found = Place(source.root, storage) if source and storage else None
        else:
            found = self.best_place(value)
        if found is not None:
            self.places[value] = found
        return found

    def fresh(self, value: Value) -> Place:
        return Place(Root(value.type), Strided.dense(value.type.shape))

    def best_place(self, value: Value) -> Place:
        """A buffer of its own in natural order, or inside the place of a user that wants it there."""
        own = self.fresh(value)
        candidates = [own]
        for user in self.users.get(value, []):
            definition = OPS.get(user.name)
            if not isinstance(definition, ViewOp):
                continue
            target = self.places.get(user.results[0])
            if target is None:
                target = self.best_place(user.results[0])
                if user.name in ("concat", "pack"):
                    self.places[user.results[0]] = target
            placed = definition.place(target.storage, [v.type for v in user.operands], dict(user.attrs))
            if placed is not None:
                candidates += [Place(target.root, s) for v, s in zip(user.operands, placed, strict=True) if v is value]
        return min(candidates, key=lambda c: self.misfits(value, c))

    def misfits(self, value: Value, place: Place) -> int:
        """How many copies a place would cost: views that cannot be addresses, pieces that are not where they belong."""
        total = 0
        if value in self.function.body.yields and not (place.storage.is_dense and place.storage.offset == 0 and place.root.type.size == value.type.size):
            total += 1
        for user in self.users.get(value, []):
            definition = OPS.get(user.name)
            if not isinstance(definition, ViewOp):
                continue
            if user.name in ("concat", "pack"):
                target = self.places.get(user.results[0])
                wanted = target and definition.place(target.storage, [v.type for v in user.operands], dict(user.attrs))
                if not target or not wanted:
                    total += 1
                    continue
                fits = [place == Place(target.root, s) for v, s in zip(user.operands, wanted, strict=True) if v is value]
                total += fits.count(False)
                continue
            storage = definition.view(place.storage, dict(user.attrs))
            total += 1 if storage is None else self.misfits(user.results[0], Place(place.root, storage))
        return total
