"""mergekit's side: references, recipe checks, planning and tasks.  The only package that imports mergekit."""

# First, so that registration finds the modules of this package whole, whichever of them a program imports.
import mergekit.merge_methods  # noqa: F401
