from halve.cli import main

main()
