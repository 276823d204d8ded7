"""Files of JSON lines that grow while a process may be killed."""

import os
from pathlib import Path


def drop_torn_line(path: Path) -> None:
    """Remove what a process that ended while writing left after the last whole line; no file is none."""
    if path.is_file():
        whole, _, torn = path.read_bytes().rpartition(b"\n")
        if torn:
            os.truncate(path, len(whole) + bool(whole))
