# SPDX-License-Identifier: Apache-2.0
"""`python -m yalis` is the command `yalis`: the form that torchrun's -m takes."""

import sys

from yalis.cli import main

if __name__ == "__main__":
    sys.exit(main())
