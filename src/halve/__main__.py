from halve.cli.app import main

main()
