"""Plain XLA implementations, for platforms, shapes and dtypes without a kernel."""
