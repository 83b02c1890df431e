from mergekit_tspa.cli import main

main()
