"""Benchmarks: each compares two ways of doing the same work, side by side in one run. `rar bench NAME` runs them."""
