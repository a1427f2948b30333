"""Tests of `pipeline/verify`."""
