"""Devices: the mesh, the sharding of each array, and the mapping of a step over the devices."""
