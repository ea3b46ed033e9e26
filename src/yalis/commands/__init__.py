# SPDX-License-Identifier: Apache-2.0
"""The commands that have a file of their own."""
