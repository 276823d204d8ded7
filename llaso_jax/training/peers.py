"""The other processes of a run: when one is lost or fails, this one ends too, with a message and in time.

A process whose peer is gone would wait for ever in the next step they have to make together. So each
writes a beat into the key-value store of JAX's coordination service (which lives in process 0) and looks
at those of the others. JAX's own heartbeat stays behind this one: it ends a process that cannot look.
"""

import contextlib
import json
import logging
import os
import sys
import threading
import time
from types import TracebackType
from typing import Any

import jax

from llaso_jax.errors import EXIT_RESUME, InterruptedRunError

logger = logging.getLogger(__name__)

_KEYS = "llaso/peers/"
_RESUME = "Start the same command again, in all processes, to continue from the last save."


def beat_seconds(timeout: float) -> float:
    """Seconds between two beats."""
    return min(timeout / 20, 2.0)


def silence_seconds(timeout: float) -> float:
    """Seconds without a beat after which a process counts as lost; leaves time to say so within `timeout`."""
    return 0.4 * timeout


def service_seconds(timeout: float) -> int:
    """JAX's own heartbeat timeout, in whole seconds: later than ours, and still within `timeout`."""
    return max(1, int(timeout * 0.8))


class Peers:
    """While active, ends this process when another is lost or fails; tells the others how this one ends."""

    def __init__(self, client: Any, *, index: int, count: int, timeout: float) -> None:
        """`client`: of the key-value store; `timeout`: seconds after which the end of a peer has ended this process."""
        self._client, self._index, self._count, self._timeout = client, index, count, timeout
        self._stopped = threading.Event()
        self._heard: dict[int, tuple[str, float]] = {}
        self._lost: set[int] = set()
        self._thread = threading.Thread(target=self._watch, name="peers", daemon=True)
        self.failed = False

    def __enter__(self) -> "Peers":
        now = time.monotonic()
        self._heard = {peer: ("", now) for peer in range(self._count) if peer != self._index}
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is not None and isinstance(error, jax.errors.JaxRuntimeError):
            self._wait_for_verdict(error)
        self._stopped.set()
        self._thread.join()
        if error is None or isinstance(error, InterruptedRunError):
            self._say(done=True)  # so do all others, and the service waits for them
            return
        self.failed = True
        interrupted = isinstance(error, KeyboardInterrupt)
        said = "it was interrupted" if interrupted else str(error) or type(error).__name__
        self._leave(EXIT_RESUME if interrupted else 1, said)

    def end(self, code: int) -> None:
        """End this process at once if it failed: an orderly end would wait for the others, which are gone."""
        if self.failed:
            _end(code)

    def _watch(self) -> None:
        beats, answered = 0, time.monotonic()
        while not self._stopped.wait(beat_seconds(self._timeout)):
            try:
                beats += 1
                self._say(beat=beats)
                self._look()
                answered = time.monotonic()
            except jax.errors.JaxRuntimeError:
                # JAX notices that too, and ends the process; here in case it does not.
                if time.monotonic() - answered > silence_seconds(self._timeout):
                    self._give_up("process 0, where the coordinator runs, does not answer")

    def _look(self) -> None:
        now = time.monotonic()
        said = dict(self._client.key_value_dir_get(_KEYS))
        for peer, (before, since) in self._heard.items():
            text = said.get(f"{_KEYS}{peer}", "")
            if text != before:
                self._heard[peer] = text, now
                message = json.loads(text)
                if "code" in message:
                    self._give_up(f"process {peer}: {message['said']}", message["code"])
            elif now - since > silence_seconds(self._timeout) and "done" not in before:
                self._lost.add(peer)
                self._give_up(
                    f"process {peer} of {self._count} is lost: nothing was heard of it for "
                    f"{now - since:.0f} s (--peer-timeout {self._timeout:g})"
                )

    def _wait_for_verdict(self, error: BaseException) -> None:
        """A step that broke off may be the first sign of a lost process: then the watch ends this one."""
        logger.warning(
            "a step that all processes make together broke off (%s); seeing for up to %g s whether "
            "one is lost",
            str(error).splitlines()[0],
            self._timeout,
        )
        self._stopped.wait(self._timeout)

    def _give_up(self, why: str, code: int = EXIT_RESUME) -> None:
        what = f"llaso train: process {self._index} ends, for {why}"
        sys.stderr.write(f"{what}. {_RESUME}\n" if code == EXIT_RESUME else f"{what}\n")
        self._leave(code, why)
        _end(code)

    def _leave(self, code: int, said: str) -> None:
        """Tell the others; process 0 waits until they have heard it, for the store ends with it."""
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._say(code=code, said=said)
            deadline = time.monotonic() + 2 * beat_seconds(self._timeout)
            waiting = set(self._heard) - self._lost if self._index == 0 else set()
            while waiting and time.monotonic() < deadline:
                time.sleep(0.02)
                for key, text in self._client.key_value_dir_get(_KEYS):
                    if "beat" not in json.loads(text):
                        waiting.discard(int(key.removeprefix(_KEYS)))

    def _say(self, **message: Any) -> None:
        self._client.key_value_set(
            f"{_KEYS}{self._index}", json.dumps(message), allow_overwrite=True
        )


def _end(code: int) -> None:
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
