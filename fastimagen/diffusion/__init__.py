"""Noise schedules, training objectives, samplers and guidance."""
