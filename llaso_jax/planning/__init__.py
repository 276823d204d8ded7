"""Training steps compiled for hardware that is not there."""
