"""The command line `cosmos-scale`, a file a command."""
