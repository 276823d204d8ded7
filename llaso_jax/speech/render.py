"""Many clips made into files by several processes; a call that was interrupted goes on where it stood."""

import contextlib
import dataclasses
import hashlib
import os
import shutil
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import NamedTuple

from llaso_jax.data.audio import load_audio
from llaso_jax.errors import ConfigError
from llaso_jax.speech.audio_file import encode, write_whole
from llaso_jax.speech.clip import ClipSpec, Utterance, clip_samples
from llaso_jax.speech.errors import RenderError, SpeechError
from llaso_jax.speech.journal import Entry, Journal, RenderedClip
from llaso_jax.speech.recognize import load_recognizer, model_folder, word_error
from llaso_jax.speech.samples import SAMPLE_RATE
from llaso_jax.speech.synthesis import synthesizer

__all__ = ["ClipSpec", "RenderedClip", "Utterance", "render"]

BATCH = 8  # clips of one task of a process
AHEAD = 2  # tasks of each process that are under way or waiting
SCRATCH = ".rendering"


class Job(NamedTuple):
    """A clip to be made."""

    spec: ClipSpec
    digest: str


Outcome = Entry | SpeechError


def render(
    specs: Sequence[ClipSpec], folder: Path, *, workers: int, recognizer: str | None = None
) -> Iterator[RenderedClip]:
    """Make every clip that is not there yet; yields all of them in the order of `specs`.

    The folder's journal, rendered.jsonl, has a line for every finished clip. A clip is made again if
    its description, an engine's version or its file has changed, or if the recognizer that is asked
    for has not heard it. Files that no clip of `specs` names are left alone. One call at a time may
    work in a folder.

    Args:
      specs: descriptions, each with a path of its own.
      folder: where the files go; made if needed.
      workers: processes; 0 to work in this one. Each loads engines and recognizer once.
      recognizer: `whisper-tiny.en`, or a folder with a CTranslate2 Whisper, to hear every file and fill
        `wer` and `heard`.

    Raises:
      ConfigError: two clips of one path, or a negative number of workers; before any clip is made.
      MissingEngineError: an engine or the recognizer is not installed; likewise.
      SynthesisError: a text that gives no sound, when its turn comes; names text and voice. Clips made
        before it, and those under way, are in the journal.
      RenderError: a process was killed, or the journal is none. After the first, the same call goes on.
    """
    if workers < 0:
        raise ConfigError(f"{workers} workers were asked for; 0 (this process) or more are needed")
    seen = set()
    for spec in specs:
        if spec.path in seen:
            raise ConfigError(f"two clips have the path {spec.path!r}; each needs its own")
        seen.add(spec.path)
    for engine in sorted({engine for spec in specs for engine in spec.engines}):
        synthesizer(engine)
    if recognizer is not None:
        model_folder(recognizer)
    folder.mkdir(parents=True, exist_ok=True)
    return _rendered(specs, folder, workers, recognizer)


def _rendered(
    specs: Sequence[ClipSpec], folder: Path, workers: int, recognizer: str | None
) -> Iterator[RenderedClip]:
    journal = Journal(folder)
    jobs = [Job(spec, spec.digest()) for spec in specs]
    finished = [journal.finished(job.spec.path, job.digest, recognizer) for job in jobs]
    missing = [job for job, clip in zip(jobs, finished, strict=True) if clip is None]
    outcomes = _outcomes(missing, folder, workers, recognizer, journal)
    with contextlib.closing(outcomes):
        for clip in finished:
            if clip is None:
                outcome = next(outcomes)
                if isinstance(outcome, SpeechError):
                    raise outcome
                clip = outcome.clip
            yield clip if recognizer else dataclasses.replace(clip, wer=None, heard=None)
    shutil.rmtree(folder / SCRATCH, ignore_errors=True)


def _outcomes(
    jobs: Sequence[Job], folder: Path, workers: int, recognizer: str | None, journal: Journal
) -> Generator[Outcome, None, None]:
    """What became of each job, in order; in the journal before it comes out."""
    size = BATCH if workers else 1
    batches = [jobs[start : start + size] for start in range(0, len(jobs), size)]
    if workers and batches:
        made = _in_processes(batches, folder, min(workers, len(batches)), recognizer, journal)
    else:
        made = (_make(batch, folder, recognizer) for batch in batches)
    with contextlib.closing(made):
        for outcomes in made:
            journal.add(outcomes)
            yield from outcomes


def _in_processes(
    batches: Sequence[Sequence[Job]],
    folder: Path,
    workers: int,
    recognizer: str | None,
    journal: Journal,
) -> Generator[list[Outcome], None, None]:
    """Outcomes of each batch, in order. Closed early, it puts what was under way into the journal."""
    # JAX, which the caller may have started, does not survive a fork.
    context = get_context("spawn")
    stop = context.Event()
    pool = ProcessPoolExecutor(
        workers, mp_context=context, initializer=_start_worker, initargs=(stop,)
    )
    futures: deque[Future[list[Outcome]]] = deque()
    try:
        for batch in batches:
            with _interrupts_wait():  # a process that is started has no handler of its own yet
                futures.append(pool.submit(_make, batch, folder, recognizer))
            if len(futures) > AHEAD * workers:
                yield _first(futures)
        while futures:
            yield _first(futures)
    except BrokenProcessPool as error:
        raise RenderError(
            f"one of {workers} processes that rendered clips was killed, for want of memory perhaps. The same "
            "call goes on from what is finished; try fewer workers"
        ) from error
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)
        for future in futures:
            if not future.cancelled() and future.exception() is None:
                journal.add(future.result())


@contextlib.contextmanager
def _interrupts_wait() -> Iterator[None]:
    """Ctrl-C is answered afterwards; processes that are started meanwhile never see it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _first(futures: deque[Future[list[Outcome]]]) -> list[Outcome]:
    outcomes = futures[0].result()  # Ctrl-C comes here: it must not lose what is under way
    futures.popleft()
    return outcomes


_stop: Event | None = None
"""Of a process of the pool: set when it should end after the clip it is at."""


def _start_worker(stop: Event) -> None:
    global _stop
    _stop = stop
    # Ctrl-C reaches every process of a terminal; the caller answers it, for all. Until here it was blocked.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A pool's processes would wait for ever for a caller that was killed."""
    parent = parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _make(batch: Sequence[Job], folder: Path, recognizer: str | None) -> list[Outcome]:
    """What became of the clips of a batch, or of its first ones when there is no time for all."""
    outcomes: list[Outcome] = []
    for job in batch:
        if _stop is not None and _stop.is_set():
            break
        try:
            outcomes.append(Entry(job.digest, recognizer, _make_one(job, folder, recognizer)))
        except SpeechError as error:
            outcomes.append(error)
    return outcomes


def _make_one(job: Job, folder: Path, recognizer: str | None) -> RenderedClip:
    spec, path = job.spec, folder / job.spec.path
    samples = clip_samples(spec)
    data = encode(samples, path.suffix, serial=int(job.digest[:8], 16))
    write_whole(path, data, scratch=folder / SCRATCH)
    seconds = round(len(samples) / SAMPLE_RATE, 3)
    clip = RenderedClip(spec.path, seconds, hashlib.sha256(data).hexdigest())
    if recognizer is None:
        return clip
    # The file as it will be read, codec and all.
    heard = load_recognizer(recognizer).transcribe(load_audio(path).samples)
    return dataclasses.replace(clip, wer=round(word_error(spec.text, heard), 4), heard=heard)
