"""The change feed: what is written elsewhere, read from a changelog that triggers fill.

In: a database in which the changelog was installed. Out: change sets, published to the views as
commits of this process are. ``contract.py`` says what a dialect has to provide, ``consumer.py``
reads it for one cache.
"""

from .consumer import Consumer
from .settings import ChangeFeed
from .status import FeedHealth

__all__ = ["ChangeFeed", "Consumer", "FeedHealth"]
