// SPDX-License-Identifier: Apache-2.0
// What kernels ask of the network.
#pragma once

#include "plan.cuh"

namespace nvrar {

// By all threads of the block. Not waited for: the source is not touched again until its parity comes back,
// and by then the peer has had the data (docs/protocol.md).
void put_block(char* to, const char* from, u64 num_bytes, int pe);

}  // namespace nvrar
