"""Tests of `pipeline/run`."""
