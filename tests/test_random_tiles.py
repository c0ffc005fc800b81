"""Random tile programs on every cpu profile: loops against the tile interpreter in float64.

`make fuzz` draws many more."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from tests.lowered import CPU_PROFILES, largest_difference, random_buffers
from tests.tile_programs import tile_programs
from tinygpt.ir.caps import Caps
from tinygpt.ir.core import Kernel
from tinygpt.ir.text import parse_kernel, print_kernel

PROGRAMS = 40 if settings.default.derandomize else settings.default.max_examples
THOROUGH = settings(max_examples=PROGRAMS, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("caps", CPU_PROFILES, ids=lambda c: c.name)
@THOROUGH
@given(kernel=tile_programs())
def test_loops_compute_the_tile_program(caps: Caps, kernel: Kernel) -> None:
    assert largest_difference(kernel, caps, random_buffers(kernel, np.random.default_rng(0))) < 3e-5, print_kernel(kernel)


@THOROUGH
@given(kernel=tile_programs())
def test_text_of_a_tile_program_is_a_fixed_point(kernel: Kernel) -> None:
    text = print_kernel(kernel)
    assert print_kernel(parse_kernel(text)) == text
