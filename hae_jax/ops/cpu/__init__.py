"""Forms of operations for CPUs: they keep what they work on in caches, by loops that accelerators would be slow in."""
