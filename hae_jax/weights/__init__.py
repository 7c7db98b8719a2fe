"""Trained networks that come with the package: one folder each, with a model card."""
