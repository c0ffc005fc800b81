"""How Hypothesis draws: the same examples every time, so that a commit passes or fails for what is in it; `make fuzz`
draws new ones, and ten times as many. And Ctrl-C ends what tests start, even where a shell that runs them in the
background has it ignored."""

from __future__ import annotations

import signal

from hypothesis import settings

signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.register_profile("fuzz", deadline=None, max_examples=1000, print_blob=True)
settings.load_profile("repeatable")
