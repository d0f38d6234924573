"""Flax NNX modules: they own the parameters, the functions in ops/ own the mathematics."""
