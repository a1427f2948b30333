"""What several tests of this room need."""

from tests.memory import _memory_given_back_after_each_test

__all__ = ["_memory_given_back_after_each_test"]
