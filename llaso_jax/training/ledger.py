"""The ledger of a stage: which samples every step took, on disk and as one hash in every checkpoint.

Each lane of the data has a file of its own, `ledger/<stage>/<lane>.jsonl`, with one line per step:
{"step": 7, "samples": ["a", "b"]}. A step's digest does not depend on the order of its samples, nor on the
processes that read them; the hash chains the digests. So a checkpoint proves the files, and the files prove
that no sample was left out or taken twice, whatever was killed, resumed or moved meanwhile.
"""

import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from llaso_jax.errors import CheckpointError

DIGEST_BITS = 256


def sample_digest(sample_ids: Iterable[str]) -> int:
    """Digest of a step's samples in any order: the sum of their SHA-256, modulo 2^256.

    Digests of parts of a step add up to that of the step. A sample that comes twice counts twice.
    """
    total = 0
    for sample_id in sample_ids:
        total += int.from_bytes(hashlib.sha256(sample_id.encode()).digest(), "big")
    return total % 2**DIGEST_BITS


def next_hash(hash_before: str, step: int, digest: int) -> str:
    """The running hash after `step`, whose samples have `digest`."""
    text = f"{hash_before} {step} {digest:064x}"
    return hashlib.sha256(text.encode()).hexdigest()


class Ledger:
    """Writes the lanes this process owns and keeps the running hash of all; close it when done."""

    def __init__(self, folder: Path, *, lanes: int, owned: Sequence[int]) -> None:
        """`owned`: lanes whose files this process writes, of `lanes` in all; each lane has one owner."""
        self._folder = folder
        self._paths = [folder / f"{lane}.jsonl" for lane in range(lanes)]
        self._owned = tuple(owned)
        self._files: dict[int, io.TextIOWrapper] = {}
        self.hash = _START

    def check(self, step: int, expected: str) -> None:
        """Raise unless the files, of all lanes, hold exactly the samples that led to `expected` at `step`.

        Raises:
          CheckpointError: a line is missing, twice there or other than it was.
        """
        value = _START
        lines = [_read(path) for path in self._paths]
        for number in range(1, step + 1):
            digest = 0
            for path, lane in zip(self._paths, lines, strict=True):
                entry = next(lane, None)
                if entry is None or entry[0] != number:
                    found = "the file ends there" if entry is None else f"step {entry[0]} is there"
                    raise CheckpointError(
                        f"{path} has no line for step {number} of the {step} that the checkpoint "
                        f"holds: {found}. {_ADVICE}"
                    )
                digest += sample_digest(entry[1])
            value = next_hash(value, number, digest % 2**DIGEST_BITS)
        if value != expected:
            raise CheckpointError(
                f"the samples listed in {self._folder} up to step {step} are not those the "
                f"checkpoint was made from (hash {value[:12]}… of the files, {expected[:12]}… in the "
                f"checkpoint). {_ADVICE}"
            )

    def open(self, step: int = 0, hash_there: str | None = None) -> None:
        """Go on after `step` with the hash it had; lines of later steps, which are done again, are cut."""
        self.hash = hash_there or _START
        for lane in self._owned:
            self._folder.mkdir(parents=True, exist_ok=True)
            _cut(self._paths[lane], step)
            self._files[lane] = self._paths[lane].open("a", encoding="utf-8")

    def add(self, step: int, samples: Mapping[int, Sequence[str]], digest: int) -> None:
        """Note `samples` of the owned lanes, and the digest of all lanes' samples."""
        for lane, file in self._files.items():
            line = {"step": step, "samples": list(samples[lane])}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self.hash = next_hash(self.hash, step, digest)

    def flush(self) -> None:
        """Have what was noted on disk, before a checkpoint says so."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()
        self._files.clear()


_START = "0" * 64
_ADVICE = (
    "What was trained on cannot be told any more: put the files back as they were, or pass "
    "--overwrite to start over."
)


def read_ledger(folder: Path) -> Iterator[tuple[int, list[str]]]:
    """(step, sample ids of all lanes), step by step, of a stage's folder `<run>/ledger/<stage>`."""
    paths = sorted(folder.glob("*.jsonl"), key=lambda path: int(path.stem))
    for entries in zip(*map(_read, paths), strict=False):
        yield entries[0][0], [sample for _, samples in entries for sample in samples]


def _read(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Whole lines of one lane's file; ends at the first that is none."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        for line in file:
            try:
                entry = json.loads(line)
                yield int(entry["step"]), list(entry["samples"])
            except (ValueError, KeyError, TypeError):
                return


def _cut(path: Path, step: int) -> None:
    """Drop the lines after `step`, and what a process that ended while writing left."""
    if not path.is_file():
        return
    keep = 0
    with path.open("rb") as file:
        for line in file:
            try:
                later = int(json.loads(line)["step"]) > step
            except (ValueError, KeyError, TypeError):
                break
            if later or not line.endswith(b"\n"):
                break
            keep += len(line)
    with path.open("r+b") as file:
        file.truncate(keep)
