"""What lies on disk: training states, converted weights, and the files of others."""
