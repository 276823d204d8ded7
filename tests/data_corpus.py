"""A byte-level ChatML tokenizer and a small corpus of tones, made on the spot for data tests."""

import json

import numpy as np
import soundfile as sf

from llaso_jax.data.config import AudioLayout, DataConfig
from llaso_jax.data.pipeline import make_pipeline
from llaso_jax.data.prompt import PromptConfig
from llaso_jax.data.tokenizer import add_audio_tokens

CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LAYOUT = AudioLayout(mode="true_length", mel_bins=8)
PROMPT = PromptConfig(chat_format="tokenizer", system_prompt="Hear.")
SHAPE = {
    "sequence_length": 700,
    "rows": 2,
    "chunks_per_row": 4,
    "answers_per_row": 60,
    "mel_buckets": (50, 150),
    "window": 6,
    "prefetch_batches": 0,
    "num_threads": 2,
}


def byte_tokenizer():
    """Bytes as tokens, ChatML as template: no download and no training needed."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = CHATML
    return add_audio_tokens(tokenizer)


def ask(user, answer, voices, **extra):
    """One LLaSO record."""
    turns = [{"from": "human", "value": user}, {"from": "gpt", "value": answer}]
    return {"voice": voices, "conversations": turns, **extra}


def write_corpus(folder, *, samples=17):
    """`samples` records of 0 to 2 tones between 0.1 s and 1.4 s; returns the JSON file."""
    rng = np.random.default_rng(0)
    records = []
    for i in range(samples):
        voices = []
        for part in range((1, 1, 2, 0)[i % 4]):
            seconds = rng.uniform(0.1, 0.4) if i % 3 else rng.uniform(0.6, 1.4)
            wave = np.sin(np.arange(int(16_000 * seconds)) * (0.1 + 0.01 * i))
            sf.write(folder / f"{i}-{part}.wav", wave * 0.5, 16_000)
            voices.append(f"{i}-{part}.wav")
        records.append(ask(f"Say{'<audio>' * len(voices)}", f"answer {i}", voices, id=f"s{i}"))
    path = folder / "data.json"
    path.write_text(json.dumps(records))
    return path


def batches_of(path, tokenizer, *, split="train", layout=LAYOUT, pipeline=None, **settings):
    """Iterator of batches of the corpus at `path`."""
    config = DataConfig(**{f"{split}_json": (str(path),), **SHAPE, **settings})
    dataset = make_pipeline(
        config, split=split, tokenizer=tokenizer, layout=layout, prompt=PROMPT, **(pipeline or {})
    )
    return iter(dataset)


def ids_of(batches):
    """Sample ids of all batches, in order."""
    return [i for batch in batches for row in batch.sample_ids for i in row]
