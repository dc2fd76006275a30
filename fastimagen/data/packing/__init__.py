"""Images and captions as people have them, in folders and tables, -> WebDataset shards."""
