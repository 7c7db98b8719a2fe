"""Import of weights and runs from PyTorch, and export of weights to it."""
