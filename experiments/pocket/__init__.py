"""The pocket world: a small language model of the Python standard library, and tasks built from held-out modules."""
