"""Starling cookbook: rankings, K-wise reward models, APA and their evaluation.

The way of the data is the order of the modules: `rankings` → `reward` → `apa` →
`evaluation`; each module's docstring says what it knows and what it does not.
"""

__version__ = "0.1.0"
