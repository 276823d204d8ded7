"""How many frames a piece of audio becomes on its way to the language model.

mel frames (100/s) -> encoder frames (50/s, convolution of stride 2) -> projected frames (k stacked).
Data and model both call these functions, so slots and frames cannot disagree.
"""

from typing import Literal, get_args

AudioMode = Literal["padded", "trimmed", "true_length"]
"""What the encoder sees and what of it reaches the language model.

padded: every chunk is padded to 30 s and all its frames reach the LLM (what released LLaSO weights saw).
trimmed: the encoder sees the padded 30 s, only frames of real audio reach the LLM.
true_length: the encoder sees only real audio too (in length buckets, padding masked out).
"""

AUDIO_MODES: tuple[str, ...] = get_args(AudioMode)
SAMPLE_RATE = 16_000
HOP_LENGTH = 160
CHUNK_SECONDS = 30
CHUNK_SAMPLES = CHUNK_SECONDS * SAMPLE_RATE
CHUNK_MEL_FRAMES = CHUNK_SAMPLES // HOP_LENGTH  # 3000
CONV_STRIDE = 2


def encoder_frames(mel_frames: int) -> int:
    """Encoder positions for `mel_frames` mel frames: ceil(mel_frames / 2)."""
    return -(-mel_frames // CONV_STRIDE)


def projected_frames(mel_frames: int, *, stack: int = 1) -> int:
    """Frames leaving the projector for `mel_frames` mel frames: ceil(encoder frames / stack)."""
    return -(-encoder_frames(mel_frames) // stack)


def audio_slots(mel_frames: int, *, mode: AudioMode, stack: int = 1) -> int:
    """LLM positions one chunk of `mel_frames` valid mel frames takes up in `mode`.

    The slots of a chunk are always its first projected frames, 0 .. slots-1.
    """
    return projected_frames(CHUNK_MEL_FRAMES if mode == "padded" else mel_frames, stack=stack)
