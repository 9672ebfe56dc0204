"""From one's own pipeline to a scorer for it: collect and label trajectories, then train, calibrate and evaluate."""
