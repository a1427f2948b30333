"""Pixels to embeddings: the actor, its runners, and the recipe that makes an output's embeddings again.

It knows devices and precision. It does not know Ray, shards or Parquet files.
"""
