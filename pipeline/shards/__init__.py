"""What a shard is: found, streamed, read as tar members, samples and parts; peeked into; packed.

It knows bytes and keys. It does not decode images, and does not know where results are stored.
"""
