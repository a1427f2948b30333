"""Tests of `pipeline/decoding`."""
