"""Training: optimizer, step, checkpoints, validation and the loop that runs them."""
