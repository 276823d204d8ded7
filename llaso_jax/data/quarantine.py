"""What happens to samples that cannot be used: stop, or list them and go on up to a share."""

import json
import logging
from pathlib import Path
from typing import Literal

from llaso_jax.data.config import DataConfig
from llaso_jax.errors import DataError

logger = logging.getLogger(__name__)


class Quarantine:
    """Applies `bad_sample_policy`.

    The file holds one JSON line per bad sample: stream position, sample id, place in the data
    file, error type and text. It mirrors the position of the data: after a resume, lines of
    samples that will be read again are taken out, so none is listed twice.

    Args:
        config: policy, share and minimum count.
        file: where bad samples are listed; None where another process lists them.
    """

    def __init__(self, config: DataConfig, file: Path | None) -> None:
        self._policy: Literal["raise", "quarantine"] = config.bad_sample_policy
        self._max_share = config.max_quarantined_share
        self._min_samples = config.quarantine_min_samples
        self._file = file

    def rewind(self, position: int) -> None:
        """Drop the lines of stream positions from `position` on."""
        if self._file is None or not self._file.exists():
            return
        lines = self._file.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if _position(line) < position]
        if len(kept) < len(lines):
            self._file.write_text("".join(kept), encoding="utf-8")

    def reject(self, position: int, error: DataError) -> None:
        """List one bad sample, or raise its error under the policy `raise`."""
        if self._policy == "raise":
            raise error
        line = {
            "position": position,
            "sample_id": error.sample_id,
            "record": error.position,
            "error": type(error).__name__,
            "message": str(error),
        }
        if self._file is not None:
            logger.warning("quarantined: %s", error)
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def judge(self, *, quarantined: int, read: int, at_end: bool = False) -> None:
        """Raise DataError if too large a share of the samples read so far was bad."""
        if not quarantined or (read < self._min_samples and not at_end):
            return
        if quarantined > self._max_share * read:
            raise DataError(
                f"{quarantined} of {read} samples are bad ({quarantined / read:.1%}), more than "
                f"`max_quarantined_share` = {self._max_share:.1%}; they are listed in "
                f"{self._file}. Repair the data, or raise the share"
            )


def _position(line: str) -> int:
    try:
        return int(json.loads(line)["position"])
    except (ValueError, KeyError, TypeError):
        return 0  # not a line of ours, or cut off by a crash: leave it
