# SPDX-License-Identifier: Apache-2.0
"""``python -m nvrar`` is the command ``nvrar``: the form that torchrun's -m takes."""

import sys

from nvrar.cli import main

if __name__ == "__main__":
    sys.exit(main())
