"""Text embeddings and the encoders that compute them."""
