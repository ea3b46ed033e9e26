# SPDX-License-Identifier: Apache-2.0
"""How the ranks share one model: who holds which part, and how their partial sums meet."""
