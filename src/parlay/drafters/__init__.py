"""Drafters: whoever guesses tokens. One file each."""
