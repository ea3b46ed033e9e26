// SPDX-License-Identifier: Apache-2.0
// NVSHMEM's device side, and the only place that includes it: compiled once, linked with every kernel that
// puts.
#pragma once

// The headers of NVSHMEM 3.4.5 use these traits under `std`, which NVRTC does not have.
#include <cuda/std/type_traits>
namespace std {
using cuda::std::conditional;
using cuda::std::enable_if;
using cuda::std::is_floating_point;
using cuda::std::is_integral;
using cuda::std::is_same;
using cuda::std::is_signed;
using cuda::std::is_unsigned;
}  // namespace std

#include <nvshmem.h>
#include <nvshmemx.h>

#include "put.cuh"

namespace nvrar {

void put_block(char* to, const char* from, u64 num_bytes, int pe) {
    nvshmemx_putmem_nbi_block(to, from, num_bytes, pe);
}

}  // namespace nvrar
