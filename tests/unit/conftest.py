"""Settings of the unit tests: generated examples are the same in every run."""

from hypothesis import settings

settings.register_profile("unit", derandomize=True, deadline=None, database=None)
settings.load_profile("unit")
