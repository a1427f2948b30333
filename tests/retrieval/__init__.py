"""Tests of `pipeline/retrieval`."""
