"""Reading Hugging Face and Orbax checkpoints into a model, and its parameters by name."""
