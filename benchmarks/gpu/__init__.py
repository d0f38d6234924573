"""132B on one Hopper GPU (H100 or H200): checked against float32 references, then timed, within a budget of seconds."""
