"""Applies to all tests."""

import gc


def pytest_collection_finish() -> None:
    # What the test modules have imported stays until the end; a garbage collection would walk all of it each time, and
    # Megatron asks for two with each save of an optimizer.
    gc.collect()
    gc.freeze()
