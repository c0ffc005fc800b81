"""Makes .links/tinygpt: links to every package where its import name says, so that type checkers find them uninstalled."""

from __future__ import annotations

import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("ir", "lowering", "runtime", "targets")


def main() -> None:
    links = ROOT / ".links" / "tinygpt"
    shutil.rmtree(links, ignore_errors=True)
    links.mkdir(parents=True)
    facade = [path for path in (ROOT / "tinygpt").iterdir() if path.name != "__pycache__"]
    for path in [*facade, *(ROOT / name for name in PACKAGES)]:
        (links / path.name).symlink_to(path)


if __name__ == "__main__":
    main()
