"""What hypothesis does in this suite: the same examples on every machine, and no timing decides.

`TEST_RANDOM=1` looks for new ones, which is for a quiet hour: what it finds is a bug, and a test of its own.
"""

import os

from hypothesis import settings

settings.register_profile("baton", deadline=None, derandomize=os.environ.get("TEST_RANDOM") != "1")
settings.load_profile("baton")
