"""Code that all recipes share: arguments, data, models, tuning, trainer, inference, reports and tools.

Importing this package sets the environment of torch's threads, so import it before torch. `recipes/__init__.py` does.
"""

import os

#: how often an idle thread of torch looks for work before it sleeps. The default of libgomp, 300,000, keeps a core that
#: another process needs: beside one busy process on two cores, training then takes 3 to 13 times as long.
SPIN_COUNT = "1000"


def limit_spinning() -> bool:
    """Set `GOMP_SPINCOUNT`, unless the user has set it or `OMP_WAIT_POLICY`; return whether it was set.

    libgomp reads the variables when torch is loaded
    (https://gcc.gnu.org/onlinedocs/libgomp/GOMP_005fSPINCOUNT.html). Child processes inherit them.
    """
    if {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        return False
    os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT
    return True


#: whether `GOMP_SPINCOUNT` is the choice of this package in this process
SPINNING_LIMITED = limit_spinning()
