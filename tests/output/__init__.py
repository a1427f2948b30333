"""Tests of `pipeline/output`."""
