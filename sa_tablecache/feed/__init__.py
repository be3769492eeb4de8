"""The change feed: what is written elsewhere, read from a changelog that triggers fill.

In: a database in which ``changelog.py``'s SQL was installed. Out: change sets, published to the
views as commits of this process are. ``contract.py`` says what a dialect has to provide.
"""
