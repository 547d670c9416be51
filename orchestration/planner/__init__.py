"""What fits where, before a GPU is spent."""
