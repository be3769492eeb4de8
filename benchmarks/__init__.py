"""What the cache costs, measured against what a program could do without it.

``python -m benchmarks`` prints ratios within one run: each subject and its baseline take turns,
round by round, so that a slow minute of the machine hits both. See :mod:`benchmarks.harness`.
"""
