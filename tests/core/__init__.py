"""Tests of `pipeline/core`."""
