"""Planning a model on accelerators: memory, rooflines, messages, and compiling without the devices."""
