from mergekit_tspa.commands.main import main

main()
