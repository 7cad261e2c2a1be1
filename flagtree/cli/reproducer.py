"""Moved to flagtree/reproducer.py, which runtime may import; this name goes when nobody asks for it any more."""

from flagtree.reproducer import describe, write

__all__ = ["describe", "write"]
