"""How Hypothesis draws: the same examples every time, so that a commit passes or fails for what is in it; `make fuzz`
draws new ones, and ten times as many."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.register_profile("fuzz", deadline=None, max_examples=1000, print_blob=True)
settings.load_profile("repeatable")
