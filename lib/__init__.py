"""Support code for the scripts in the root folder, which can be read without opening it."""
