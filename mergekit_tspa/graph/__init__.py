"""mergekit's side: references, recipe checks, planning and tasks.  The only package that imports mergekit."""
