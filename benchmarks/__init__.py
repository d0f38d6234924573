"""The benchmark harness: `python -m benchmarks` from the repository root; docs/benchmarks.md has its results.

This module imports nothing: the workers of the peers run where only the peer is installed.
"""
