"""The demo: the main job on a bundled model, next to the same job in the clear, and a page about it."""
