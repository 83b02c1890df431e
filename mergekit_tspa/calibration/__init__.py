"""What models see and say: statistics of inputs, the examples' format, and scoring in memory.

A model is loaded once.  Adapters, and merges of them, stand beside its layers and are never written into it.
"""
