"""One file a command: parse (by signature), call the library, print. Results to stdout, progress to stderr."""
