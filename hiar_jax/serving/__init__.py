"""The page of hiar_jax.serve: who may watch, what each viewer's generation does, and the bytes that
pass.
"""
