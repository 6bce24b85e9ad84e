"""What a job costs: operations, memory, weights."""
