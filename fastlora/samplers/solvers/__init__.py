"""Solvers: each a function from noise levels to a table of coefficients."""
