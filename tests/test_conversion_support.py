"""Checkpoints in LLaSO's layout for the conversion tests: made here with torch, or read from ../shared/oracle."""

import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

ORACLES = Path(__file__).resolve().parents[2] / "shared" / "oracle"
ORACLE_NAMES = ("tiny-tied-80", "tiny-untied-128")
TOWER = "model.audio_tower.audio_tower."
ALIGNER = "model.mm_audio_aligner.projector."
VOCAB = 61


def whisper_config(mels=80, **changes):
    from transformers import WhisperConfig

    return WhisperConfig(
        **{
            "num_mel_bins": mels,
            "d_model": 32,
            "encoder_layers": 2,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_layers": 1,
            "decoder_attention_heads": 4,
            "decoder_ffn_dim": 32,
            "vocab_size": 60,
            "max_target_positions": 20,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 1,
            **changes,
        }
    )


def llama_config(tied=True, scaled=True, **changes):
    from transformers import LlamaConfig

    rope = {"rope_type": "default", "rope_theta": 5e5}
    if scaled:
        rope = {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    return LlamaConfig(
        **{
            "vocab_size": VOCAB,
            "hidden_size": 48,
            "intermediate_size": 80,
            "num_hidden_layers": 3,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 131072,
            "tie_word_embeddings": tied,
            "rope_parameters": rope,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            "attn_implementation": "eager",
            **changes,
        }
    )


class TorchSpeechLM:
    """The reference: transformers' encoder and decoder with a torch projector between."""

    def __init__(
        self, *, mels=80, projector="mlp2x_gelu", tied=True, scaled=True, seed=0, frames=60
    ):
        from transformers import LlamaForCausalLM, WhisperModel

        torch.manual_seed(seed)
        self.whisper = WhisperModel(whisper_config(mels, max_source_positions=frames)).eval()
        self.llama = LlamaForCausalLM(llama_config(tied, scaled)).eval()
        for model in (self.whisper, self.llama):
            for name, parameter in model.named_parameters():
                if "embed_positions" not in name:
                    torch.nn.init.normal_(parameter, std=0.1)
        d_in, d_out = self.whisper.config.d_model, self.llama.config.hidden_size
        self.type = projector
        if projector == "linear":
            self.projector = torch.nn.Linear(d_in, d_out)
        else:
            layers = [torch.nn.Linear(d_in, d_out)]
            for _ in range(int(projector[3]) - 1):
                layers += [torch.nn.GELU(), torch.nn.Linear(d_out, d_out)]
            self.projector = torch.nn.Sequential(*layers)

    def state(self, *, tower=True, dtype=torch.float32):
        state = dict(self.llama.state_dict())
        if self.llama.config.tie_word_embeddings:
            state.pop("lm_head.weight", None)
        if tower:
            state |= {TOWER + k: v for k, v in self.whisper.encoder.state_dict().items()}
        state |= {ALIGNER + k: v for k, v in self.projector.state_dict().items()}
        return {name: value.to(dtype).contiguous().clone() for name, value in state.items()}

    def config(self):
        """config.json as transformers 4.43 writes it."""
        config = self.llama.config.to_dict()
        rope = config.pop("rope_parameters")
        config["rope_theta"] = rope.pop("rope_theta")
        config["rope_scaling"] = rope if rope["rope_type"] == "llama3" else None
        config.pop("head_dim")
        return {
            **config,
            "model_type": "llava_llama",
            "architectures": ["LlavaLlamaForCausalLM"],
            "mm_audio_tower": "../whisper",
            "audio_projector_type": self.type,
            "mm_audio_hidden_size": self.whisper.config.d_model,
            "mm_audio_select_layer": -1,
            "mm_audio_select_feature": "patch",
            "language": "English",
            "task": "transcribe",
        }

    def save(self, root: Path, *, weights="safetensors", shards=1, tower=True, dtype=torch.float32):
        """root/model, root/whisper and root/mm_audio_aligner.bin, as the oracles have them."""
        folder = root / "model"
        folder.mkdir(parents=True)
        self.whisper.save_pretrained(root / "whisper")
        state = self.state(tower=tower, dtype=dtype)
        save_state(folder, state, weights=weights, shards=shards)
        (folder / "config.json").write_text(json.dumps(self.config()))
        torch.save(
            {k: v for k, v in state.items() if k.startswith(ALIGNER)}, root / "mm_audio_aligner.bin"
        )
        return folder


def save_state(folder: Path, state, *, weights="safetensors", shards=1):
    from safetensors.torch import save_file

    stem, suffix = (
        ("model", "safetensors") if weights == "safetensors" else ("pytorch_model", "bin")
    )
    names = list(state)
    weight_map = {}
    for i in range(shards):
        part = {name: state[name] for name in names[i::shards]}
        name = f"{stem}.{suffix}" if shards == 1 else f"{stem}-{i + 1:05d}-of-{shards:05d}.{suffix}"
        if weights == "safetensors":
            save_file(part, folder / name, metadata={"format": "pt"})
        else:
            torch.save(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    if shards > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))


def read_state(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a folder of safetensors as bytes with their dtype and shape, read by the library."""
    from safetensors.torch import load_file

    state = {}
    for file in sorted(folder.glob("*.safetensors")):
        loaded = load_file(file)
        assert not state.keys() & loaded.keys()
        state |= loaded
    return state


def assert_bit_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert a[name].shape == b[name].shape, name
        same = a[name].contiguous().view(torch.uint8) == b[name].contiguous().view(torch.uint8)
        assert bool(same.all()), name


def oracle_mel(rows: int, chunks: int, mels: int, frames: int = 3000) -> np.ndarray:
    """The features of ../shared/oracle/README.md, f32[rows, chunks, mels, frames]."""
    b, c, m, t = np.ogrid[:rows, :chunks, :mels, :frames]
    return (1.2 * np.sin(0.37 * m + 0.011 * t * (1 + c) + b)).astype(np.float32)


def splice(input_ids, labels, features_mask, *, slots=1500):
    """Rows with -300 for an audio -> the batch contract without mel (upstream's splicing, by hand)."""
    rows = []
    for ids, targets, owners in zip(input_ids, labels, features_mask, strict=True):
        tokens, slot, target = [], [], []
        end = int(np.flatnonzero(ids)[-1]) + 1
        audio = 0
        for token, label in zip(ids[:end], targets[:end], strict=True):
            if token == -300:
                audio += 1
                frames = [
                    c * slots + s for c in np.flatnonzero(owners == audio) for s in range(slots)
                ]
                tokens += [0] * len(frames)
                slot += frames
                target += [-100] * len(frames)
            else:
                tokens.append(int(token))
                slot.append(-1)
                target.append(int(label))
        rows.append((tokens, slot, target))
    length = max(len(tokens) for tokens, _, _ in rows)
    answers = max(sum(t != -100 for t in target) for _, _, target in rows)
    batch = {
        "tokens": np.zeros((len(rows), length), np.int32),
        "audio_slot": np.full((len(rows), length), -1, np.int32),
        "positions": np.zeros((len(rows), length), np.int32),
        "segment_ids": np.zeros((len(rows), length), np.int32),
        "answer_index": np.full((len(rows), answers), -1, np.int32),
        "answer_token": np.zeros((len(rows), answers), np.int32),
    }
    for row, (tokens, slot, target) in enumerate(rows):
        n = len(tokens)
        batch["tokens"][row, :n] = tokens
        batch["audio_slot"][row, :n] = slot
        batch["positions"][row, :n] = np.arange(n)
        batch["segment_ids"][row, :n] = 1
        supervised = [i for i, t in enumerate(target) if t != -100]
        batch["answer_index"][row, : len(supervised)] = [i - 1 for i in supervised]
        batch["answer_token"][row, : len(supervised)] = [target[i] for i in supervised]
    return batch


def goldens_of(reference: TorchSpeechLM) -> dict[str, np.ndarray]:
    """What golden.npz of an oracle holds, computed with the torch reference."""
    ids = np.array(
        [[1, 5, 6, -300, 7, 8, 9, 10, 2, 0, 0], [1, -300, 11, 12, -300, 13, 14, 15, 16, 17, 2]]
    )
    labels = np.full_like(ids, -100)
    labels[0, 6:9], labels[1, 7:11] = ids[0, 6:9], ids[1, 7:11]
    mask = np.array([[1, 0, 0], [1, 1, 2]])
    sizes = reference.whisper.config
    mel = torch.from_numpy(oracle_mel(2, 3, sizes.num_mel_bins, 2 * sizes.max_source_positions))
    golden = {"input_ids": ids, "labels": labels, "features_mask": mask}
    total, count, prompt = 0.0, 0, None
    for row in range(2):
        with torch.no_grad():
            hidden = reference.whisper.encoder(mel[row]).last_hidden_state
        if row == 1:
            golden["encoder_1_0"] = hidden[0, ::50].numpy()
        frames = reference.projector(hidden)
        pieces, targets, audio = [], [], 0
        for token, label in zip(ids[row], labels[row], strict=True):
            if token == -300:
                audio += 1
                heard = frames[np.flatnonzero(mask[row] == audio)].flatten(0, 1)
                pieces.append(heard)
                targets += [-100] * len(heard)
            elif token:
                pieces.append(reference.llama.get_input_embeddings().weight[token][None])
                targets.append(int(label))
            if row == 0 and len(pieces) == 6:
                prompt = torch.cat(pieces)[None]
        logits = reference.llama(inputs_embeds=torch.cat(pieces)[None]).logits[0]
        where = np.unique(np.linspace(0, len(targets) - 1, 7).astype(int))
        golden |= {f"pos{row}": where, f"logits{row}": logits[where].detach().numpy()}
        supervised = torch.tensor([i for i, t in enumerate(targets) if t != -100])
        total = total + torch.nn.functional.cross_entropy(
            logits[supervised - 1], torch.tensor(targets)[supervised], reduction="sum"
        )
        count += len(supervised)
    loss = total / count
    loss.backward()
    golden["loss"] = loss.detach().numpy()
    for name, parameter in reference.projector.named_parameters():
        golden[f"grad.{ALIGNER}{name}"] = parameter.grad.numpy()
    with torch.no_grad():
        golden["greedy_row0_first6"] = reference.llama.generate(
            inputs_embeds=prompt,
            attention_mask=torch.ones(prompt.shape[:2], dtype=torch.long),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=2,
            pad_token_id=0,
        ).numpy()
    return golden
