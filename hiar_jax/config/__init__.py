"""Configuration: the command line and config files, and the stored config of a workdir."""
