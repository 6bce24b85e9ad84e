"""What blocks see of earlier forwards: the window rule, and the ring that keeps K/V."""
