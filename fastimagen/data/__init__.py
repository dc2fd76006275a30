"""Captioned pictures: shards, transforms, text embeddings, built-in shapes."""
