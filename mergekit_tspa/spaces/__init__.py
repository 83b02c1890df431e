"""Coordinates in which the updates of several adapters can be compared."""
