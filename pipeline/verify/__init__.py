"""An output proven, or its faults named.

It reads what is stored and the shards. It changes nothing, and does not know Ray.
"""
