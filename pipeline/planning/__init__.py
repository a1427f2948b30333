"""What is decided before the flow runs: job, pending shards, engine, batch size, resources, nodes.

It knows the cluster. It does not run the flow.
"""
