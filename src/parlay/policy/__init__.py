"""What to bet. NumPy only: nothing here imports torch, so that a simulator can drive the same policies."""
