"""Coordinates in which the updates of several adapters can be compared.

A space is a function from the factors of n updates to their `Coordinates`: a basis on each side of the
tensor, or the factors themselves.
"""
