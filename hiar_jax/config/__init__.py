"""From the command line and config files to frozen dataclasses, and the config of a workdir."""
