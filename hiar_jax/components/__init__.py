"""Text encoders and autoencoders: prompt -> text, pixels <-> latents."""
