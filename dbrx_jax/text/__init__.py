"""The tokenizer, its vocabulary, and chat templates."""
