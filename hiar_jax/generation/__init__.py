"""Generation with a trained student: the model, the conditioning frames, the list of videos."""
