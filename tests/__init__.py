"""The tests mirror the package: `tests/<part>/test_*.py`.  What several of them share is imported as `tests.<part>.<module>`."""
