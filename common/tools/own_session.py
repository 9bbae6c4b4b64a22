"""Put the process that imports this module into a session of its own.

`common.tools.runner` forks runs from such a process: a signal to the group of the command must not end that process
before its runs have saved their checkpoints.
"""

import os

os.setsid()
