"""The course: exercise pages, patches that begin and solve an exercise, and its checks."""
