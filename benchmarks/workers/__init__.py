"""Worker processes of the measured engines; each peer runs in a virtual environment of its own."""
