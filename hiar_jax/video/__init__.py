"""Files that people watch: ours and those of others."""
