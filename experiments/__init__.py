"""One config per run; a variant imports another config and changes fields of it."""
