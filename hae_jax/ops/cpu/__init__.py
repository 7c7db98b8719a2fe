"""Forms of operations for CPUs. They use loops to keep data in caches, which would be slow on accelerators."""
