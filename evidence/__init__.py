"""What measures the rest: diagnostics, experiments, statistics, bench. Nothing that trains imports it."""
