"""Faults on purpose: a failing network, killed processes."""
