"""Video and image files: reading any format, writing mp4, PNG and contact sheets."""
