"""Tests of `pipeline/embedding`."""
