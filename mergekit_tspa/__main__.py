"""`python -m mergekit_tspa` is `mergekit-tspa`."""

from mergekit_tspa.commands.main import main

main()
