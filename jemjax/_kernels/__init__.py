"""What is written for CPUs, each beside a reference that says what it computes.

These need jax only. What calls them has checked the arguments.
"""
