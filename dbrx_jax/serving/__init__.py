"""HTTP server: an API compatible with OpenAI's, over the engine."""
