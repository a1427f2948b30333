"""Tests of `pipeline/shards`."""
