"""Programs beside the lesson: python -m tools.NAME."""
