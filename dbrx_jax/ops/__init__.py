"""The model's mathematics as pure functions on arrays, with reference implementations of what kernels/ computes."""
