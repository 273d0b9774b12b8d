"""One module per command of `mygpt`. A command calls the library, and prints results to stdout and progress to stderr."""
