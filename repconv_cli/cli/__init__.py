"""The command line: one command a file. Parses, calls a use case, prints, exits."""

# Shown from the process's first moment until a command's first phase has a name.
FIRST_PHASE = "Starting"
