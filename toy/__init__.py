"""The miniature: python -m toy."""
