"""Runnable examples: the flights of New York in 2013 as a cached view."""
