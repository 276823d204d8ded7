"""What Debian packages hold: recordings and texts that anyone can fetch by name, without being installed."""

import io
import shutil
import tarfile
from collections.abc import Sequence
from pathlib import Path

from llaso_jax.errors import DataError


def unpack(sources: Sequence[Path], scratch: Path, *, fetch: str) -> Path:
    """A folder with the content of packages.

    Args:
        sources: one folder that holds them unpacked, or the .deb files.
        scratch: where .deb files are unpacked to.
        fetch: the command that downloads them, for errors.

    Raises:
        DataError: something else.
    """
    if len(sources) == 1 and sources[0].is_dir():
        return sources[0]
    for source in sources:
        if not source.is_file():
            raise DataError(
                f"{source} is neither a folder nor a .deb file; give the packages as they are, or one folder that "
                f"holds them unpacked: {fetch}"
            )
        with _files_of(source) as archive:
            for member in archive:
                if member.isfile():
                    _write(archive, member, scratch)
    return scratch


def _write(archive: tarfile.TarFile, member: tarfile.TarInfo, folder: Path) -> None:
    """One regular file, inside `folder`. (tarfile's own filter for this came with Python 3.11.4.)"""
    target = (folder / member.name).resolve()
    if not target.is_relative_to(folder.resolve()):
        raise DataError(f"the package holds {member.name!r}, a path outside of its folder")
    content = archive.extractfile(member)
    assert content is not None  # of a regular file
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("wb") as file:
        shutil.copyfileobj(content, file)


def _files_of(deb: Path) -> tarfile.TarFile:
    """The files of a Debian package: a member `data.tar.*` of an ar archive."""
    with deb.open("rb") as file:
        if file.read(8) != b"!<arch>\n":
            raise DataError(f"{deb} is no Debian package")
        while len(header := file.read(60)) == 60:
            name, size = header[:16].decode("ascii", "replace").strip(), int(header[48:58])
            if name.startswith("data.tar"):
                try:
                    return tarfile.open(fileobj=io.BytesIO(file.read(size)))
                except tarfile.TarError as error:
                    raise DataError(f"{deb}: {name} cannot be unpacked here ({error})") from error
            file.seek(size + size % 2, io.SEEK_CUR)
    raise DataError(f"{deb} holds no files")
