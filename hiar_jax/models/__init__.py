"""Networks: the DiT, the text encoders and the autoencoders."""
