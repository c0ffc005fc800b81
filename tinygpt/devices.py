"""What only this machine can say of an option: which device a profile stands for that is read from the device itself."""

from __future__ import annotations

import json
from collections.abc import Mapping

from tinygpt.runtime.engine import local_device
from tinygpt.targets import target


def settled(name: str, options: Mapping[str, str]) -> dict[str, str]:
    """Options of target `name` that mean the same anywhere, as a bundle records them.

    Where they choose the profile that is read from this machine's device, its description becomes the option `device`:
    a bundle is then lowered again as it was, wherever that is. One that was given is kept. Raises UserError if there is
    no such target, or no such device here."""
    device = target(name)
    if not device.live or options.get("profile") != device.live or "device" in options:
        return dict(options)
    return {**options, "device": json.dumps(local_device(name), sort_keys=True)}
