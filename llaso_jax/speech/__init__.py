"""Text to speech: voices of several engines, changed, joined, written and checked, in several processes.

text + voice -> samples (espeak.py, piper.py) -> joined and changed (clip.py, augment.py) -> file (audio_file.py);
render.py does it for many, recognize.py says how much of each an ASR model understands.
"""
