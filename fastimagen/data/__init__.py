"""Captioned images: shards, transforms, text embeddings, built-in shapes."""
