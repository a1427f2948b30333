"""Tests of `pipeline/backbones`."""
