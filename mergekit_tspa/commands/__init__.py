"""The command line: the room that knows click."""
