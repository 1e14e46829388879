"""File systems that are small, or cannot be written, for tests of what is saved."""

import subprocess

import pytest


def mount(folder, options):
    """Mounts a file system in memory on a folder, or skips the test."""
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("a small file system cannot be made: there is no mount")
    if done.returncode:
        pytest.skip(f"a small file system cannot be made: {done.stderr.strip()}")
