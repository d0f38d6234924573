"""The engines that are measured, each in a process and, but for ours, in a virtual environment of its own."""
