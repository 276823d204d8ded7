"""Prompts: exact ids and labels of the published preprocessing, and refusal of what cannot fit."""

import json
from pathlib import Path

import numpy as np
import pytest
from data_corpus import CHATML, byte_tokenizer

from llaso_jax.data.prompt import (
    AUDIO_ID,
    LLASO_SYSTEM_PROMPT,
    PromptConfig,
    Turn,
    check_tokenizer,
    encode_prompt,
)
from llaso_jax.data.tokenizer import ADDED_TOKENS, load_tokenizer
from llaso_jax.errors import ConfigError, PromptError

GOLDEN = json.loads((Path(__file__).parent / "golden" / "golden_prompts.json").read_text("utf-8"))
CASES = {case["name"]: case for case in GOLDEN["cases"]}


@pytest.fixture(scope="module")
def llama3():
    pytest.importorskip("llama_models")
    from llaso_jax.data.tokenizer import llama3_tokenizer

    return llama3_tokenizer()


@pytest.fixture(scope="module")
def chatml():
    return byte_tokenizer()


def turns_of(case):
    return [Turn(t["from"], t["value"]) for t in case["record"]["conversations"]]


def ask(*texts):
    return [Turn(("human", "gpt")[i % 2], text) for i, text in enumerate(texts)]


def supervised_text(prompt, tokenizer):
    return tokenizer.decode(prompt.token_ids[prompt.supervised])


def test_added_tokens_have_the_golden_ids(llama3):
    assert len(llama3) == GOLDEN["vocab"]
    for token, id in GOLDEN["token_ids"].items():
        assert llama3.convert_tokens_to_ids(token) == id
    assert llama3.pad_token == "<unk>"


@pytest.mark.parametrize("name", CASES)
def test_ids_and_labels_equal_upstream(llama3, name):
    case = CASES[name]
    prompt = encode_prompt(turns_of(case), llama3, audios=len(case["record"]["voice"]))
    assert prompt.token_ids.tolist() == case["input_ids"]
    assert prompt.labels.tolist() == case["labels"]


@pytest.mark.parametrize(
    "user", ["Transcribe this.<audio>", "<audio>Who speaks?", "Please listen.<audio>", "<audio>"]
)
def test_supervised_tokens_are_the_answer_and_end_of_turn(llama3, user):
    prompt = encode_prompt(ask(user, " An answer. "), llama3, audios=1)
    assert supervised_text(prompt, llama3) == "An answer.<|eot_id|>"


def test_every_assistant_turn_is_supervised(llama3):
    prompt = encode_prompt(ask("<audio>One?", "First.", "Two?<audio>", "Second."), llama3, audios=2)
    assert supervised_text(prompt, llama3) == "First.<|eot_id|>Second.<|eot_id|>"
    assert (prompt.token_ids == AUDIO_ID).sum() == 2
    assert (prompt.token_ids == llama3.bos_token_id).sum() == 1


def test_generation_prompt_is_the_unsupervised_beginning_of_the_training_prompt(llama3, chatml):
    for tokenizer, format in ((llama3, "llama32_audio_v1_mmtag"), (chatml, "tokenizer")):
        config = PromptConfig(chat_format=format)
        train = encode_prompt(ask("Say.<audio>", "Yes."), tokenizer, config)
        generate = encode_prompt(ask("Say.<audio>"), tokenizer, config, for_generation=True)
        first = int(np.argmax(train.supervised))
        assert generate.token_ids.tolist() == train.token_ids[:first].tolist()
        assert not generate.supervised.any()


def test_empty_system_prompt_leaves_the_block_out(llama3):
    prompt = encode_prompt(ask("Hi", "Yes"), llama3, PromptConfig(system_prompt=""))
    text = llama3.decode(prompt.token_ids)
    assert text.startswith("<|begin_of_text|><|start_header_id|>user")
    assert LLASO_SYSTEM_PROMPT in llama3.decode(encode_prompt(ask("Hi", "Yes"), llama3).token_ids)


def test_chatml_supervises_answers_and_their_end_of_turn(chatml):
    config = PromptConfig(chat_format="tokenizer")
    prompt = encode_prompt(ask("A<audio>", "First.", "B", "Second."), chatml, config, audios=1)
    assert supervised_text(prompt, chatml) == "First.<|im_end|>Second.<|im_end|>"
    whole = chatml.decode(np.where(prompt.token_ids == AUDIO_ID, 0, prompt.token_ids))
    assert whole.endswith("<|im_start|>assistant\nSecond.<|im_end|>\n")
    assert "<|im_start|>user\nA\n<Audio><audio_start>" in whole


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        (None, "has none"),
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}", "cannot be told"),
        (CHATML.replace("m['content']", "m['content'] | upper"), "cannot be told"),
        ("{{ messages | length }}" + CHATML, "cannot be told"),  # rewrites what went before
    ],
)
def test_templates_that_hide_the_answer_are_refused(chatml, template, problem):
    from copy import deepcopy

    tokenizer = deepcopy(chatml)
    tokenizer.chat_template = template
    with pytest.raises(PromptError, match=problem):
        encode_prompt(ask("A", "b"), tokenizer, PromptConfig(chat_format="tokenizer"))


@pytest.mark.parametrize(
    ("turns", "audios", "problem"),
    [
        (ask("Hi<audio>", "  "), 1, "empty"),
        ([Turn("human", "Hi"), Turn("robot", "Yo")], 0, "'robot'"),
        ([Turn("gpt", "Yo")], 0, "'human' must speak"),
        (ask("Hi"), 0, "last turn"),
        ([], 0, "last turn"),
        (ask("Hi<audio>", "Yo"), 2, "1 <audio> in the conversation and 2 audios"),
        (ask("Hi", "Yo"), 1, "0 <audio>"),
        (ask("Hi<audio>", "Y<audio>o"), 2, "only users"),
    ],
)
def test_conversations_that_cannot_be_learnt_are_refused(chatml, turns, audios, problem):
    with pytest.raises(PromptError, match=problem):
        encode_prompt(turns, chatml, audios=audios)


def test_text_past_model_max_length_is_an_error_or_a_recorded_truncation(chatml):
    turns = ask("<audio>Hi", "Word " * 50)
    base = {"chat_format": "tokenizer", "system_prompt": ""}
    full = encode_prompt(turns, chatml, PromptConfig(**base))
    text_tokens = int((full.token_ids != AUDIO_ID).sum())
    with pytest.raises(PromptError, match=f"{text_tokens} text tokens, `model_max_length` is 200"):
        encode_prompt(turns, chatml, PromptConfig(**base, model_max_length=200))
    cut = encode_prompt(
        turns, chatml, PromptConfig(**base, model_max_length=200, length_policy="truncate")
    )
    assert (cut.token_ids != AUDIO_ID).sum() == 200
    assert cut.tokens_dropped == text_tokens - 200
    with pytest.raises(PromptError, match="all answers"):
        encode_prompt(
            turns, chatml, PromptConfig(**base, model_max_length=30, length_policy="truncate")
        )


def test_tokenizer_reloads_from_a_folder_and_from_a_file(chatml, tmp_path):
    chatml.save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = load_tokenizer(path)
        assert loaded.encode("<Audio>a</Audio>") == chatml.encode("<Audio>a</Audio>")
        assert all(token in loaded.get_vocab() for token in ADDED_TOKENS)
    with pytest.raises(ConfigError, match="no tokenizer at"):
        load_tokenizer(tmp_path / "none")


def test_tokenizer_loads_beside_the_configuration_of_a_llaso_checkpoint(chatml, tmp_path):
    chatml.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llava_llama", "rope_scaling": {}}')
    assert len(load_tokenizer(tmp_path)) == len(chatml)


def test_tokenizers_that_lack_what_the_format_needs_are_refused(chatml, llama3):
    check_tokenizer(llama3, PromptConfig())
    check_tokenizer(chatml, PromptConfig(chat_format="tokenizer"))
    with pytest.raises(ConfigError, match=r"no <\|start_header_id\|>"):
        check_tokenizer(chatml, PromptConfig())
    with pytest.raises(ConfigError, match="needs a chat template"):
        check_tokenizer(llama3, PromptConfig(chat_format="tokenizer"))
