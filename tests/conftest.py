"""For all tests: property-based ones try the same examples each time, and have no deadline.

So that a run never fails by luck, nor because the machine is busy.
"""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("steady", derandomize=True, deadline=None)
settings.load_profile("steady")
