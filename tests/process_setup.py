"""Runs of `llaso train` in several real processes on this machine, joined over a port of its own."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from training_setup import records


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Processes:
    """`count` processes of one run; a context that kills what is left of them."""

    def __init__(
        self,
        recipe: Path,
        output: Path,
        *,
        count: int,
        mesh: str = "8x1",
        peer_timeout: float = 60,
        environment: Callable[[int], Mapping[str, str]] | None = None,
    ) -> None:
        """`environment`: of each process, instead of flags."""
        port = free_port()
        self.output = output
        self.logs = [output.with_name(f"{output.name}-{index}.log") for index in range(count)]
        self.processes = []
        for index, log in enumerate(self.logs):
            flags = [
                *("--coordinator", f"127.0.0.1:{port}"),
                *("--processes", str(count), "--process-id", str(index)),
            ]
            with log.open("a") as stream:
                process = subprocess.Popen(
                    [
                        *(sys.executable, "-m", "llaso_jax.train", "--mesh", mesh),
                        *("--config", str(recipe), "--output", str(output)),
                        *("--peer-timeout", str(peer_timeout)),
                        *([] if environment else flags),
                    ],
                    env={
                        **os.environ,
                        "JAX_COMPILATION_CACHE_DIR": str(recipe.parent / "compiled"),
                        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
                        **(environment(index) if environment else {}),
                    },
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                )
            self.processes.append(process)

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def said(self, index: int | None = None) -> str:
        """What a process, or all of them, have written, on one line."""
        logs = self.logs if index is None else [self.logs[index]]
        return " ".join(" ".join(log.read_text() for log in logs).split())

    def wait_for(self, moment: Callable[[], bool], *, seconds: float = 900) -> None:
        """Return when `moment()` is true; fail if a process ends before."""
        deadline = time.monotonic() + seconds
        while not moment():
            assert all(process.poll() is None for process in self.processes), self.said()
            assert time.monotonic() < deadline, f"the moment never came: {self.said()}"
            time.sleep(0.005)

    def codes(self, *, seconds: float = 900) -> list[int]:
        """Exit codes of all, once they have ended."""
        deadline = time.monotonic() + seconds
        return [p.wait(timeout=max(deadline - time.monotonic(), 0.1)) for p in self.processes]


def steps_done(output: Path) -> int:
    """Training steps logged so far."""
    return len(records(output)) if (output / "metrics.jsonl").is_file() else 0


def saved_steps(output: Path, stage: str = "align") -> list[int]:
    """Steps of the whole checkpoints of a stage."""
    folder = output / "checkpoints" / stage
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if name.isdecimal())
