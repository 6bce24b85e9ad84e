"""Files on disk: training states, converted weights, and published weight files."""
