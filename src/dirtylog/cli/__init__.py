"""The command line: a table of subcommands, one module each, over a library that never prints."""
