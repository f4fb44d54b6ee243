"""Settings of all tests."""

from hypothesis import settings

# Times are for benchmarks: on a busy machine any example may take long, and that says nothing about it.
settings.register_profile("ome-tensor", deadline=None)
settings.load_profile("ome-tensor")
