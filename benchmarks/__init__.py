"""The benchmark harness: `python -m benchmarks` from the repository root; docs/benchmarks.md says what it found.

This module imports nothing: the workers of the peers run where only the peer is installed.
"""
