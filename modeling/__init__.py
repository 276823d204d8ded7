"""Pure model code: functions and Flax modules from arrays to arrays. No files, no configuration parser.

Shape letters used everywhere:
B batch rows, S text+audio positions of a row, C audio chunks of a row, M mel bins, F mel frames,
T encoder frames, D model width, N query heads, K key/value heads, H head width, V vocabulary,
A supervised answer positions of a row, L layers.
"""
