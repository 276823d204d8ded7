"""Models named by their id on the Hugging Face hub, fetched into the hub's own cache."""

import logging
import re
from pathlib import Path

from llaso_jax.conversion.errors import UnknownSourceError

logger = logging.getLogger(__name__)

HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
"""`owner/name`, or `owner/name@revision`."""
_TEXT = ["*.json", "*.jinja", "*.model", "*.txt"]
_WEIGHTS = (["*.safetensors"], ["*.bin"])
"""What is fetched, in the order it is tried: pickles only where there is nothing else."""


def fetch(hub_id: str) -> Path:
    """The folder of a hub repository; from the cache where it is there already.

    Args:
      hub_id: that matches HUB_ID. HF_TOKEN, HF_HOME and HF_HUB_OFFLINE are those of huggingface_hub.

    Raises:
      UnknownSourceError: no network and not in the cache, no such repository, or no access to it.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    match = HUB_ID.fullmatch(hub_id)
    assert match is not None, hub_id
    for patterns in _WEIGHTS:
        try:
            folder = Path(
                snapshot_download(
                    match["repo"], revision=match["revision"], allow_patterns=_TEXT + patterns
                )
            )
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            reason = str(error).strip().split("\n")[0]
            raise UnknownSourceError(
                f"{hub_id} is no folder or file here, and could not be fetched from the Hugging Face hub "
                f"({type(error).__name__}: {reason}). If it is a path, correct it. If it is a hub id: "
                "connect to the network and unset HF_HUB_OFFLINE; for a gated model accept its licence "
                "and set HF_TOKEN; or download it elsewhere and give its folder."
            ) from error
        if any(folder.glob(patterns[0])):
            logger.info("%s is %s", hub_id, folder)
            return folder
    raise UnknownSourceError(
        f"{hub_id} on the Hugging Face hub has no .safetensors and no .bin file. For a file of another "
        "format, download it and give its path."
    )
