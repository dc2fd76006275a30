"""Shards behind URLs: downloaded in bounded time into a bounded cache, ahead of the position."""
