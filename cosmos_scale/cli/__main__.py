"""`python -m cosmos_scale.cli`: the command `cosmos-scale`, where it is not on PATH."""

from cosmos_scale.cli.main import program

if __name__ == "__main__":
    program()
