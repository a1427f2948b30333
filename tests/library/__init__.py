"""Tests of `shard_embedder`: the same from Python."""
