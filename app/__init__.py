"""What a run prints, draws and saves, and what is built around runs: sweeps, timing, training a reward model."""
