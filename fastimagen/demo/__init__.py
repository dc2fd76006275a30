"""A web page for a model: captions in, images and the settings that reproduce them out. Needs the `demo` extra."""
