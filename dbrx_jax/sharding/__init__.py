"""Meshes, partition specs and collectives, mesh recipes, and runs of several processes."""
