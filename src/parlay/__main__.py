"""`python -m parlay`: the command, where its script is not on the path."""

from parlay.cli import app

if __name__ == "__main__":
    app(prog_name="parlay")
