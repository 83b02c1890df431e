"""mergekit's side: references, recipe checks, planning and tasks.  Only `compat` imports mergekit."""

from mergekit_tspa.plugin.compat import import_methods

# First, so that registration finds the modules of this package whole, whichever of them a program imports.
import_methods()
