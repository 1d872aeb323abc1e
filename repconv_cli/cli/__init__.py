"""The command line: one command a file. Parses, calls a use case, prints, exits."""
