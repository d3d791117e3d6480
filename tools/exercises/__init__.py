"""The checks of the exercises in docs/course: one file each, run by tools/check_exercise.py."""
