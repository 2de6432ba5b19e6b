"""What measures the rest: diagnostics of a round, experiments for the claims, and a bench against well-known peers."""
