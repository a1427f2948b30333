"""Tests of whole jobs: faults, kills, clusters, docs and deployment."""
