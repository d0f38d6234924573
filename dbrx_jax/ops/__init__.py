"""The model's mathematics as pure functions on arrays, each fast version beside its plain reference."""
