# SPDX-License-Identifier: Apache-2.0
"""From files to parameters, each rank reading only its own part."""
