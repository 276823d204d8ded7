"""What answers were made from: enough to tell another checkpoint, or other questions, at the same path."""

import hashlib
from pathlib import Path
from typing import Any

BLOCK_BYTES = 1 << 20


def file_identity(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
            size += len(block)
    return {"bytes": size, "sha256": digest.hexdigest()}


def folder_identity(folder: Path, *, but: Path) -> str:
    """SHA-256 of the names, sizes and modification times of the files in a folder.

    Weights of many gigabytes are not read for it. `but`: a folder that is no part of it, should it lie inside.
    """
    digest, but = hashlib.sha256(), but.resolve()
    for path in sorted(folder.resolve().rglob("*")):
        if path.is_file() and not path.is_relative_to(but):
            status = path.stat()
            line = f"{path.relative_to(folder.resolve())}\t{status.st_size}\t{status.st_mtime_ns}\n"
            digest.update(line.encode(errors="surrogateescape"))
    return digest.hexdigest()
