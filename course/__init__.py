"""The course: pages, checks, the states before and after each exercise."""
