"""Networks: the diffusion transformer, the text encoder and the video autoencoders."""
