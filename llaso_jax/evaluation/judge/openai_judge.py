"""A judge behind any OpenAI-compatible endpoint; what it said is cached by content."""

import hashlib
import json
import logging
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llaso_jax.evaluation.errors import JudgeError
from llaso_jax.evaluation.json_records import without_halves
from llaso_jax.evaluation.judge.prompt import MAX_TOKENS, TEMPERATURE, messages
from llaso_jax.evaluation.metrics.digits import number
from llaso_jax.evaluation.metrics.judge_score import HIGHEST, LOWEST, parse_score
from llaso_jax.evaluation.predictions import Item, Judgements, ModelFolder, Predictions
from llaso_jax.evaluation.tasks import TaskFile

logger = logging.getLogger(__name__)

# Seconds; the openai client waits so between its own retries.
FIRST_WAIT, LONGEST_WAIT, LONGEST_ASKED = 0.5, 8.0, 60.0
PUBLIC = "https://api.openai.com/v1"


@dataclass
class OpenAIJudge:
    """Asks a language model for every answer that is not in the cache.

    Attributes:
      model: name at the endpoint.
      base_url: of the endpoint; None for OpenAI's own. The key is OPENAI_API_KEY.
      cache: folder of what was said, one file per question, so that a re-run is free and offline.
      per_minute: most requests started in a minute; 0: any number.
      workers: requests under way at a time.
      timeout: seconds until a request is given up.
      retries: of a request after time-outs, lost connections, 429 and 5xx, waiting longer each time (or as
        long as the endpoint asks for).
      attempts: requests for one answer until one states a score.
    """

    model: str
    base_url: str | None
    cache: Path
    per_minute: float = 0
    workers: int = 4
    timeout: float = 60
    retries: int = 6
    attempts: int = 3
    asked: int = field(default=0, init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)
    _client: Any = field(default=None, init=False)
    _failure: JudgeError | None = field(default=None, init=False)
    _next_start: float = field(default=0.0, init=False)

    @property
    def name(self) -> str:
        """Model and endpoint, as a report shows them."""
        return f"{self.model} at {self._endpoint}"

    @property
    def _endpoint(self) -> str:
        """Where the client goes: it reads OPENAI_BASE_URL where no endpoint is given."""
        return (self.base_url or os.environ.get("OPENAI_BASE_URL") or PUBLIC).rstrip("/")

    def __call__(
        self, folder: ModelFolder, spec: TaskFile, predictions: Predictions
    ) -> Judgements | None:
        """Judge every answer of a file.

        Raises:
          JudgeError: the endpoint cannot be reached or refuses; what was judged so far is cached.
        """
        self._failure = None
        with ThreadPoolExecutor(self.workers) as pool:
            told = list(pool.map(self._evaluate, predictions.items))
        scores = tuple(_valid_score(text) for text in told)
        unreadable = [number for number, score in enumerate(scores) if score is None]
        notes = [f"{spec.file}: the judge states no score for item {n}" for n in unreadable]
        return Judgements(scores, scores, tuple(told), notes=tuple(notes))

    def _evaluate(self, item: Item) -> str:
        """What the judge says of one answer."""
        asked = messages(item.reference, item.answer)
        path = self.cache / f"{self._key(asked)}.json"
        if (kept := _kept(path)) is not None:
            return kept
        text = ""
        for _ in range(self.attempts):
            if self._failure is not None:  # of another thread: the rest would fail too
                raise self._failure
            text = self._ask(asked)
            if _valid_score(text) is not None:
                self._keep(path, asked, text)
                break
            logger.warning("the judge states no score from 1 to 5: %.80r", text)
        return text

    def _key(self, asked: list[dict[str, str]]) -> str:
        # Two endpoints may serve different models of one name.
        parts = [self._endpoint, self.model, TEMPERATURE, MAX_TOKENS, asked]
        content = json.dumps(parts, ensure_ascii=False)
        return hashlib.sha256(content.encode()).hexdigest()

    def _keep(self, path: Path, asked: list[dict[str, str]], text: str) -> None:
        # Threads of one process and processes that share the cache write to files of their own.
        temporary = path.with_suffix(f".{os.getpid()}.{threading.get_ident()}.tmp")
        kept = {"model": self.model, "messages": asked, "evaluation": without_halves(text)}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(kept, ensure_ascii=False), encoding="utf-8")
            temporary.replace(path)
        except OSError as problem:
            raise JudgeError(
                f"--judge-cache {self.cache} cannot be written to: {problem.strerror}."
            ) from problem

    def _ask(self, asked: list[dict[str, str]]) -> str:
        """What the endpoint says; every attempt waits for its turn, also those after a failure."""
        client, failures = self._connected(), 0
        import openai

        passing = (
            openai.APIConnectionError,  # time-outs too
            openai.RateLimitError,
            openai.ConflictError,
            openai.InternalServerError,
        )
        while True:
            self._pace()
            with self._lock:
                self.asked += 1
            try:
                answer = client.chat.completions.create(
                    model=self.model, messages=asked, temperature=TEMPERATURE, max_tokens=MAX_TOKENS
                )
                return _content(answer)
            except json.JSONDecodeError:
                return ""  # 200 without JSON: no score, asked again
            except openai.OpenAIError as problem:
                if isinstance(problem, passing) and failures < self.retries:
                    time.sleep(_wait(problem, failures))
                    failures += 1
                    continue
                after = f" after {failures} retries" if failures else ""
                self._failure = JudgeError(
                    f"the judge {self.name} did not answer{after}: {problem}. What it has judged is kept in "
                    f"{self.cache}: the same command goes on from there."
                )
                raise self._failure from problem

    def _connected(self) -> Any:
        with self._lock:
            if self._client is None:
                try:
                    import openai
                except ImportError as problem:
                    raise JudgeError(
                        "--judge openai needs the openai client: pip install 'llaso-jax[judge]'."
                    ) from problem
                self._client = openai.OpenAI(
                    base_url=self.base_url,
                    # A local endpoint asks for none, and the client refuses to start without one.
                    api_key=os.environ.get("OPENAI_API_KEY", "none"),
                    timeout=self.timeout,
                    max_retries=0,  # the client's own retries would not keep to the rate
                )
            return self._client

    def _pace(self) -> None:
        """Wait until the next request may start."""
        if not self.per_minute:
            return
        with self._lock:
            now = time.monotonic()
            start = max(now, self._next_start)
            self._next_start = start + 60 / self.per_minute
        time.sleep(max(0.0, start - now))


def _kept(path: Path) -> str | None:
    """What was said before; None where nothing was, or where its file is damaged."""
    try:
        text = json.loads(path.read_text(encoding="utf-8"))["evaluation"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as problem:
        logger.warning("%s cannot be read and is judged again: %s", path, problem)
        return None
    return text if isinstance(text, str) and _valid_score(text) is not None else None


def _content(answer: Any) -> str:
    """The text of a completion; "" of a response that is none."""
    try:
        return str(answer.choices[0].message.content or "")
    except (AttributeError, IndexError, KeyError, TypeError):
        return ""


def _wait(problem: Exception, failures: int) -> float:
    """Seconds until a request is sent again: what the endpoint asks for, else longer each time."""
    headers = getattr(getattr(problem, "response", None), "headers", {})
    for name, unit in (("retry-after-ms", 1000), ("retry-after", 1)):
        asked = number(headers.get(name, ""))  # "retry-after" may also be a date
        if asked is not None and 0 <= asked <= LONGEST_ASKED * unit:
            return asked / unit
    return min(FIRST_WAIT * 2**failures, LONGEST_WAIT)


def _valid_score(text: str) -> int | None:
    score = parse_score(text)
    return score if score is not None and LOWEST <= score <= HIGHEST else None


def default_cache() -> Path:
    """In the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llaso_jax" / "judge"
