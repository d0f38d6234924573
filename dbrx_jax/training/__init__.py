"""Training: the loss and the step. Needs the extra [train]."""
