"""Hand-written forward and backward passes, each with its slow obvious twin."""
