"""PyTorch weights and runs in, PyTorch weights out."""
