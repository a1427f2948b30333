"""Tests of `pipeline/pages`."""
