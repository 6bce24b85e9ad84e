"""HiAR in JAX: long video by hierarchical denoising (arXiv 2603.08703)."""

__version__ = "0.1.0"
