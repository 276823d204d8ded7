"""Conversations to token ids: chat template, audio place-holders and what is supervised.

A template turns a conversation into pieces of text, each supervised or not, and every piece is
tokenized by itself: so the mask is exact, and a training prompt holds the very tokens that
generation starts from.

    (t,a)  user "Transcribe this.<audio>" ->
           …user<|end_header_id|>\\n\\nTranscribe this.\\n<Audio><audio_start> AUDIO <audio_end>…
    (a,t)  user "<audio>Who speaks?"      ->
           …user<|end_header_id|>\\n\\n<Audio><audio_start> AUDIO <audio_end></Audio>\\nWho speaks?…
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from llaso_jax.data.tokenizer import AUDIO_TAGS
from llaso_jax.errors import ConfigError, PromptError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PROMPT_FILE = "llaso_prompt.json"
"""Beside a model's weights: the `PromptConfig` it was trained with."""

AUDIO_PLACEHOLDER = "<audio>"
PURE_AUDIO_TEXT = "Please listen to the audio and answer the question."
"""LLaSO's instruction where the recording itself asks."""
AUDIO_ID = -300  # stands for one audio until its frames are spliced in
IGNORED_LABEL = -100

LLASO_SYSTEM_PROMPT = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant is able to understand the audio content that the user provides, and assist "
    "the user with a variety of tasks using natural language."
    # No blank here: released weights saw it this way.
    "The audio content will be provided with the following format: <Audio>audio content</Audio>."
)

ChatFormat = Literal["llama32_audio_v1_mmtag", "tokenizer"]
"""LLaSO's own template, or the chat template the tokenizer brings (ChatML for SmolLM2)."""


@dataclass(frozen=True)
class Turn:
    """One message: `role` is "human" or "gpt"."""

    role: str
    text: str


@dataclass(frozen=True)
class PromptConfig:
    """How conversations become tokens.

    Attributes:
        chat_format: see `ChatFormat`.
        system_prompt: text of the system block; empty for none.
        model_max_length: most text tokens of a sample, counted before audio is spliced in.
        length_policy: what happens past that: an error, or a truncation on record.
    """

    chat_format: ChatFormat = "llama32_audio_v1_mmtag"
    system_prompt: str = LLASO_SYSTEM_PROMPT
    model_max_length: int = 2048
    length_policy: Literal["error", "truncate"] = "error"

    def __post_init__(self) -> None:
        if self.model_max_length < 1:
            raise ConfigError(f"model_max_length is {self.model_max_length}; at least 1 is needed")


LLASO_PROMPT = PromptConfig()


@dataclass(frozen=True)
class EncodedPrompt:
    """A tokenized conversation whose audios are still place-holders.

    Attributes:
        token_ids: int32[n], `AUDIO_ID` where an audio goes.
        supervised: bool[n], the tokens the model learns to write.
        tokens_dropped: text tokens cut off by `length_policy: truncate`.
    """

    token_ids: np.ndarray
    supervised: np.ndarray
    tokens_dropped: int = 0

    @property
    def labels(self) -> np.ndarray:
        """int32[n]: token ids where supervised, -100 elsewhere."""
        return np.where(self.supervised, self.token_ids, IGNORED_LABEL).astype(np.int32)


Piece = tuple[str, bool]
"""Text and whether it is supervised."""


def encode_prompt(
    turns: Sequence[Turn],
    tokenizer: "PreTrainedTokenizerFast",
    config: PromptConfig = LLASO_PROMPT,
    *,
    audios: int | None = None,
    for_generation: bool = False,
) -> EncodedPrompt:
    """Tokenize a conversation; every answer and its end-of-turn token is supervised.

    Args:
        turns: human and gpt in turn, human first; a gpt turn last, or a human turn
            when `for_generation`: the result then ends after the assistant header.
        tokenizer: with LLaSO's tokens (see `llaso_jax.data.tokenizer`).
        audios: how many audios the sample has; None leaves that unchecked.

    Raises:
        PromptError: unknown role, wrong order, empty answer, place-holders that do not match
            the audios, or more text than `model_max_length` under `length_policy: error`.

    Source: llaso/train/train.py `preprocess_llama_3_2`, template `llama32_audio_v1_mmtag`.
    """
    _check_turns(turns, audios, for_generation)
    render = _llama32_pieces if config.chat_format == "llama32_audio_v1_mmtag" else _template_pieces
    pieces = render(turns, tokenizer, config.system_prompt, for_generation)
    ids: list[int] = []
    supervised: list[bool] = []
    for text, learnt in pieces:
        for i, part in enumerate(text.split(AUDIO_PLACEHOLDER)):
            if i:
                ids.append(AUDIO_ID)
            ids += tokenizer.backend_tokenizer.encode(part, add_special_tokens=False).ids
            supervised += [learnt] * (len(ids) - len(supervised))
    prompt = EncodedPrompt(np.asarray(ids, np.int32), np.asarray(supervised, bool))
    return _within_max_length(prompt, config, for_generation)


def check_tokenizer(tokenizer: "PreTrainedTokenizerFast", config: PromptConfig) -> None:
    """Raise ConfigError if `tokenizer` lacks a token or template that `config` needs.

    Without this, a missing `<|eot_id|>` would quietly be spelt out in several tokens.
    """
    needed = [*AUDIO_TAGS]
    if config.chat_format == "llama32_audio_v1_mmtag":
        needed += ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    elif not tokenizer.chat_template:
        raise ConfigError("`chat_format: tokenizer` needs a chat template; the tokenizer has none")
    known = tokenizer.get_vocab()
    missing = [token for token in needed if token not in known]
    if missing or tokenizer.pad_token_id is None:
        raise ConfigError(
            f"the tokenizer has no {', '.join(missing) or 'pad token'}, which `chat_format: "
            f"{config.chat_format}` needs: load it with llaso_jax.data.tokenizer.load_tokenizer, "
            "or choose another `chat_format`"
        )


def wrap_audio(user_text: str) -> str:
    """Put LLaSO's tags and line breaks around each `<audio>` of one (stripped) user message."""
    tagged = f"<Audio><audio_start>{AUDIO_PLACEHOLDER}<audio_end></Audio>"
    text_first = bool(user_text.split(AUDIO_PLACEHOLDER)[0].strip())
    replacement = f"\n{tagged}\n\n" if text_first else f"{tagged}\n"
    return user_text.replace(AUDIO_PLACEHOLDER, replacement)


def _check_turns(turns: Sequence[Turn], audios: int | None, for_generation: bool) -> None:
    for i, turn in enumerate(turns):
        if turn.role not in ("human", "gpt"):
            raise PromptError(f"turn {i} is from {turn.role!r}; 'human' or 'gpt' is needed")
        expected = ("human", "gpt")[i % 2]
        if turn.role != expected:
            raise PromptError(f"turn {i} is from {turn.role!r}; {expected!r} must speak there")
        if turn.role == "gpt" and not turn.text.strip():
            raise PromptError(f"the answer in turn {i} is empty; there would be nothing to learn")
        if turn.role == "gpt" and AUDIO_PLACEHOLDER in turn.text:
            raise PromptError(f"the answer in turn {i} holds {AUDIO_PLACEHOLDER}; only users speak")
    last = turns[-1].role if turns else "nobody"
    needed = "human" if for_generation else "gpt"
    if last != needed:
        raise PromptError(f"the last turn is from {last!r}; {needed!r} is needed")
    placeholders = sum(turn.text.count(AUDIO_PLACEHOLDER) for turn in turns)
    if audios is not None and placeholders != audios:
        raise PromptError(
            f"{placeholders} {AUDIO_PLACEHOLDER} in the conversation and {audios} audios; "
            "give each audio its place-holder"
        )


def _llama32_pieces(
    turns: Sequence[Turn],
    tokenizer: "PreTrainedTokenizerFast",
    system_prompt: str,
    for_generation: bool,
) -> list[Piece]:
    """LLaSO's template. The end of each header is where the prompt stops and the answer starts."""

    def header(role: str) -> str:
        return f"<|start_header_id|>{role}<|end_header_id|>\n\n"

    pieces: list[Piece] = []
    prompt = str(tokenizer.bos_token or "<|begin_of_text|>")
    if system_prompt:
        prompt += f"{header('system')}{system_prompt}<|eot_id|>"
    for turn in turns:
        if turn.role == "human":
            prompt += f"{header('user')}{wrap_audio(turn.text.strip())}<|eot_id|>"
        else:
            pieces.append((prompt + header("assistant"), False))
            pieces.append((f"{turn.text.strip()}<|eot_id|>", True))
            prompt = ""
    if for_generation:
        pieces.append((prompt + header("assistant"), False))
    return pieces


def _template_pieces(
    turns: Sequence[Turn],
    tokenizer: "PreTrainedTokenizerFast",
    system_prompt: str,
    for_generation: bool,
) -> list[Piece]:
    """The tokenizer's own template: answers are found by rendering the conversation turn by turn."""
    if not tokenizer.chat_template:
        raise PromptError(
            "`chat_format: tokenizer` needs a tokenizer with a chat template; this one has none"
        )

    def render(messages: list[dict[str, str]], generation: bool) -> str:
        return str(
            tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=generation
            )
        )

    messages = [{"role": "system", "content": system_prompt}] if system_prompt else []
    pieces: list[Piece] = []
    done = ""
    for turn in turns:
        if turn.role == "human":
            content = wrap_audio(turn.text.strip())
            messages.append({"role": "user", "content": content})
            continue
        answer = turn.text.strip()
        before = render(messages, generation=True)
        messages.append({"role": "assistant", "content": answer})
        after = render(messages, generation=False)
        reply = after.removeprefix(before)
        tail = reply.removeprefix(answer)
        end = tail.rstrip()
        if not (before.startswith(done) and reply != after and tail != reply and end):
            raise PromptError(
                "the tokenizer's chat template rewrites earlier turns or does not close answers, "
                "so answers cannot be told from prompts; use another `chat_format`"
            )
        pieces += [(before[len(done) :], False), (answer + end, True)]
        done = before + answer + end
    if for_generation:
        pieces.append((render(messages, generation=True)[len(done) :], False))
    else:
        pieces.append((render(messages, generation=False)[len(done) :], False))
    return pieces


def _within_max_length(
    prompt: EncodedPrompt, config: PromptConfig, for_generation: bool
) -> EncodedPrompt:
    text = np.flatnonzero(prompt.token_ids != AUDIO_ID)
    excess = len(text) - config.model_max_length
    if excess <= 0:
        return prompt
    given = f"{len(text)} text tokens, `model_max_length` is {config.model_max_length}"
    if config.length_policy == "error" or for_generation:
        raise PromptError(f"{given}; raise it or set `length_policy: truncate`")
    cut = int(text[config.model_max_length])
    if (prompt.token_ids[cut:] == AUDIO_ID).any() or not prompt.supervised[:cut].any():
        raise PromptError(f"{given}: truncating would cut off an audio or all answers; raise it")
    return EncodedPrompt(prompt.token_ids[:cut], prompt.supervised[:cut], tokens_dropped=excess)
