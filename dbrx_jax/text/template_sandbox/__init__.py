"""The process that renders chat templates. It runs without the rest of the package, so imports here are relative."""
