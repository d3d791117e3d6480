"""The toy setup: python -m toy."""
