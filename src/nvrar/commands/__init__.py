# SPDX-License-Identifier: Apache-2.0
"""The commands of ``nvrar``: each adds its arguments to the parser and runs on what comes back."""
