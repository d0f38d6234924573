"""Text generation: sampling, device programs, streaming and stops."""
