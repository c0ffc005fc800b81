"""`tinygpt profile`: where the time of a training step goes, kernel by kernel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tinygpt.ir.errors import UserError
from tinygpt.regeneration import Regenerated, product_flops
from tinygpt.runtime.engine import Profiler
from tinygpt.runtime.session import Session

STEP = "train_step"


@dataclass(frozen=True)
class Row:
    """One kernel in a step: its launches, their milliseconds on the slowest thread, operations if it has products."""

    kernel: str
    of: str
    launches: int
    ms: float
    flops: int

    @property
    def gflops(self) -> float | None:
        """10⁹ operations a second, where a count is known."""
        return self.flops / self.ms / 1e6 if self.flops and self.ms else None


@dataclass(frozen=True)
class Profile:
    """The median run of a step: what computed it, its kernels by time, and what threads spent waiting for one another."""

    where: str
    rows: tuple[Row, ...]
    waiting_ms: float
    total_ms: float


def profile(session: Session, flops: Mapping[str, int], runs: int = 15) -> Profile:
    """Run training steps on random tokens, which changes the session's weights. `flops` by kernel's hash.

    Raises UserError where the engine has no clock for launches."""
    engine, manifest = session.engine, session.manifest
    if not isinstance(engine, Profiler):
        raise UserError(
            f"target {manifest.target_name} cannot time single kernels",
            hint="profile the same model compiled with --target cpp",
        )
    rng = np.random.default_rng(0)
    tokens, targets = rng.integers(0, manifest.vocab_size, (2, manifest.batch, manifest.context))
    session.train_step(tokens, targets)  # writes the inputs
    seconds = engine.profile(STEP, runs)
    typical = seconds[np.argsort(seconds.sum(axis=2).max(axis=1))[runs // 2]]
    slowest = typical[:, :-1].max(axis=0)
    launches: dict[str, list[int]] = {}
    for number, launch in enumerate(manifest.functions[STEP].launches):
        launches.setdefault(str(launch["kernel"]), []).append(number)
    rows = [_row(name, manifest.kernels.get(name, {}), numbers, slowest, flops) for name, numbers in launches.items()]
    total = float(typical.sum(axis=1).max())
    return Profile(
        engine.where(), tuple(sorted(rows, key=lambda row: -row.ms)), max(0.0, total - float(slowest.sum())) * 1e3, total * 1e3
    )


def _row(
    name: str, record: Mapping[str, object], numbers: Sequence[int], slowest: np.ndarray, flops: Mapping[str, int]
) -> Row:
    ms = float(slowest[list(numbers)].sum()) * 1e3
    return Row(name, str(record.get("of", "")), len(numbers), ms, len(numbers) * flops.get(str(record.get("hash")), 0))


def flops_by_hash(regenerated: Regenerated) -> dict[str, int]:
    """Operations of each kernel of a bundle, by its hash; those the passes would write otherwise now are not known."""
    tiles = next((stage.module.kernels for stage in regenerated.compilation.stages if stage.level == "tile"), {})
    hashes = {name: str(record["hash"]) for name, record in regenerated.compilation.manifest["kernels"].items()}
    sides = {name: kernel.cost.get("sides", (name,)) for name, kernel in regenerated.compilation.plan.kernels.items()}
    return {hashes[name]: sum(product_flops(tiles[side]) for side in own) for name, own in sides.items() if name in hashes and tiles.keys() >= set(own)}
