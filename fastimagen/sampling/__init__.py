"""Sampling from a model directory, without the training dependencies."""
