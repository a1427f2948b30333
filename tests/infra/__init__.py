"""Tests of the files of `infra/`."""
