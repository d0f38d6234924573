"""Plain XLA implementations, for CPUs and for shapes without a kernel."""
