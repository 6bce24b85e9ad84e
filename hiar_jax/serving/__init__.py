"""The web page of hiar_jax.serve: queue, sessions, uploads, and the files that browsers load."""
