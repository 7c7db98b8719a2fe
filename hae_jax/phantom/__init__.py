"""The phantom: made-up subjects on real anatomy, for whoever has no data yet."""
