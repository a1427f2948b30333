"""Tests of whole jobs: faults, kills, clusters, and what the docs say of them."""
