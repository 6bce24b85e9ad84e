"""Devices: meshes, what lies where, and how a step is mapped over them."""
