"""Words of messages."""

from __future__ import annotations


def counted(number: float, noun: str) -> str:
    """1 shard, 2 shards, 0.5 epochs. For nouns whose plural ends in s."""
    text = f"{number:g}" if isinstance(number, float) else str(number)
    return f"{text} {noun}" if number == 1 else f"{text} {noun}s"
