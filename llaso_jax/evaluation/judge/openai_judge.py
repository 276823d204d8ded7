"""A judge behind any OpenAI-compatible endpoint; what it said is cached by content."""

import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llaso_jax.evaluation.errors import JudgeError
from llaso_jax.evaluation.judge.prompt import MAX_TOKENS, TEMPERATURE, messages
from llaso_jax.evaluation.metrics.judge_score import HIGHEST, LOWEST, parse_score
from llaso_jax.evaluation.predictions import Item, Judgements, ModelFolder, Predictions
from llaso_jax.evaluation.tasks import TaskFile

logger = logging.getLogger(__name__)


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
        return f"{self.model} at {self.base_url or 'api.openai.com'}"

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
        if path.is_file():
            return json.loads(path.read_text(encoding="utf-8"))["evaluation"]
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
        content = json.dumps([self.model, TEMPERATURE, MAX_TOKENS, asked], ensure_ascii=False)
        return hashlib.sha256(content.encode()).hexdigest()

    def _keep(self, path: Path, asked: list[dict[str, str]], text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{threading.get_ident()}.tmp")
        kept = {"model": self.model, "messages": asked, "evaluation": text}
        temporary.write_text(json.dumps(kept, ensure_ascii=False), encoding="utf-8")
        temporary.replace(path)

    def _ask(self, asked: list[dict[str, str]]) -> str:
        client, error = self._connected()
        self._pace()
        try:
            answer = client.chat.completions.create(
                model=self.model, messages=asked, temperature=TEMPERATURE, max_tokens=MAX_TOKENS
            )
            return str(answer.choices[0].message.content or "")
        except error as problem:
            self._failure = JudgeError(
                f"the judge {self.name} did not answer after {self.retries} retries: {problem}. What it has "
                f"judged is kept in {self.cache}: the same command goes on from there."
            )
            raise self._failure from problem
        except (AttributeError, IndexError, TypeError, ValueError):
            return ""  # 200 without a completion: no score, asked again

    def _connected(self) -> tuple[Any, type[Exception]]:
        with self._lock:
            try:
                import openai
            except ImportError as problem:
                raise JudgeError(
                    "--judge openai needs the openai client: pip install 'llaso-jax[judge]'."
                ) from problem
            if self._client is None:
                self._client = openai.OpenAI(
                    base_url=self.base_url,
                    # A local endpoint asks for none, and the client refuses to start without one.
                    api_key=os.environ.get("OPENAI_API_KEY", "none"),
                    timeout=self.timeout,
                    max_retries=self.retries,
                )
            self.asked += 1
            return self._client, openai.OpenAIError

    def _pace(self, sleep: Callable[[float], None] = time.sleep) -> None:
        """Wait until the next request may start."""
        if not self.per_minute:
            return
        with self._lock:
            now = time.monotonic()
            start = max(now, self._next_start)
            self._next_start = start + 60 / self.per_minute
        sleep(max(0.0, start - now))


def _valid_score(text: str) -> int | None:
    score = parse_score(text)
    return score if score is not None and LOWEST <= score <= HIGHEST else None


def default_cache() -> Path:
    """In the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llaso_jax" / "judge"
