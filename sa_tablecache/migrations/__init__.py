"""Alembic: operations that install the change feed, and autogenerate that finds what they lack.

In: what the declared views need (``feed/needs.py``, ``indexing.py``) and what the database has.
Out: operations in migration files. ``operations.py`` has the operations, each with its
implementation and how it is rendered; ``comparing.py`` is what autogenerate runs; ``indexes.py`` is
its part for database indexes; ``plugin.py`` is the entry point.

This module imports nothing of Alembic, which need not be installed.
"""
