"""One config per run. A fork is an import and a change."""
