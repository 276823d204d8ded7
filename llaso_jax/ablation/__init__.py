"""Sweeps: the same training steps under other meshes or settings, measured side by side."""
