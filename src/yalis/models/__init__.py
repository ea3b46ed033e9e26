# SPDX-License-Identifier: Apache-2.0
"""One file per family, showing what is particular to it."""
