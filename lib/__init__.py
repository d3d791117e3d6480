"""What the scripts on top need and a student need not open."""
