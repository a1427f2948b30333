"""Proves that an output is right, or names its faults.

It reads what is stored, and the shards. It changes nothing, and does not know Ray.
"""
