"""Engine: continuous batching of many requests over one paged key-value cache."""
