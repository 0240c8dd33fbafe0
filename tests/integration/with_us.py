"""Services that a test starts end with the tests, however those end: a service outlives who has started it, as it should."""

import shutil

# Before the command. Its workers end with it by themselves. Where there is no setpriv, an interrupted run may leave some behind.
WITH_US = ["setpriv", "--pdeathsig", "TERM", "--"] if shutil.which("setpriv") else []
