"""Of all tests: none is timed by hypothesis, for which a pause of a busy machine would be a fault."""

from __future__ import annotations

import importlib.util

if importlib.util.find_spec("hypothesis"):
    from hypothesis import settings

    settings.register_profile("untimed", deadline=None)
    settings.load_profile("untimed")
