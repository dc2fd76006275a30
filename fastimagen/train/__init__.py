"""Training with DeepSpeed: the loop, the engine, EMA, checkpoints, metrics."""
