"""Packages for tests, made without Debian's tools."""

import io
import tarfile
from pathlib import Path


def debian_package(folder: Path, path: Path, *, member: str = "data.tar.xz", at: str = ".") -> Path:
    """A .deb with the files of `folder`, at `at`: an ar archive of three members, as dpkg writes it."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:xz") as tar:
        tar.add(folder, arcname=at)
    members = [
        ("debian-binary", b"2.0\n"),
        ("control.tar.xz", b"odd"),
        (member, archive.getvalue()),
    ]
    with path.open("wb") as file:
        file.write(b"!<arch>\n")
        for name, data in members:
            file.write(f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(data):<10}`\n".encode())
            file.write(data + b"\n" * (len(data) % 2))
    return path
