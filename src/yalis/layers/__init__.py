# SPDX-License-Identifier: Apache-2.0
"""The pieces that models are made of. A layer that owns a weight says which part of it a rank keeps."""
