// CUDA's words on a CPU, for tests: a block is a thread of the system, and its threads take turns in it. What
// the words promise holds, and no more: threads run in any order between two points where they meet.
#pragma once

#include <math.h>
#include <string.h>

namespace emulation {

struct Dim {
    unsigned x, y, z;
};

const Dim& thread_idx();
const Dim& block_idx();
const Dim& block_dim();
const Dim& grid_dim();
unsigned cluster_rank();
unsigned cluster_size();
char* shared_of(unsigned member);  // dynamic shared memory of a block of the cluster
unsigned& num_votes();             // of the block

// What the lanes of a warp show each other.
struct Exchange {
    char* address[32];
    unsigned long long word[32][2];
};
Exchange& exchange();
inline unsigned lane() { return thread_idx().x % 32; }

void yield();  // lets the others have their turn
// Until all that still run have come.
void meet_warp();
void meet_block();
void meet_cluster();
// To the same place of that rank's symmetric memory; not waited for.
void put(char* to, const char* from, unsigned long long num_bytes, unsigned rank);

// What another lane brings.
template <class T>
T from_lane(T mine, unsigned of) {
    Exchange& warp = exchange();
    memcpy(warp.word[lane()], &mine, sizeof(T));
    meet_warp();
    T theirs;
    memcpy(&theirs, warp.word[of % 32], sizeof(T));
    meet_warp();
    return theirs;
}

inline unsigned lanes_with(bool vote) {
    Exchange& warp = exchange();
    warp.word[lane()][0] = vote;
    meet_warp();
    unsigned lanes = 0;
    for (unsigned i = 0; i < 32; i++) lanes |= unsigned(warp.word[i][0] != 0) << i;
    meet_warp();
    return lanes;
}

}  // namespace emulation

#define __global__
#define __device__
#define __host__
#define __shared__ static thread_local
#define __launch_bounds__(...)
#define __maxnreg__(...)
#define __grid_constant__
#define __align__(n) alignas(n)
#define threadIdx (emulation::thread_idx())
#define blockIdx (emulation::block_idx())
#define blockDim (emulation::block_dim())
#define gridDim (emulation::grid_dim())

template <class T>
T min(T a, T b) {
    return b < a ? b : a;
}
template <class T>
T max(T a, T b) {
    return a < b ? b : a;
}

struct float2 {
    float x, y;
};
struct alignas(16) ulonglong2 {
    unsigned long long x, y;
};
inline ulonglong2 make_ulonglong2(unsigned long long x, unsigned long long y) { return {x, y}; }

inline void __syncthreads() { emulation::meet_block(); }
inline int __syncthreads_or(int vote) {
    unsigned& num_votes = emulation::num_votes();
    num_votes += vote != 0;
    __syncthreads();
    const bool any = num_votes != 0;
    __syncthreads();
    num_votes = 0;
    __syncthreads();
    return any;
}
inline bool __all_sync(unsigned, bool vote) { return emulation::lanes_with(vote) == ~0u; }
inline bool __any_sync(unsigned, bool vote) { return emulation::lanes_with(vote) != 0; }
template <class T>
T __shfl_sync(unsigned, T value, unsigned lane) {
    return emulation::from_lane(value, lane);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, unsigned mask) {
    return emulation::from_lane(value, emulation::lane() ^ mask);
}

template <class T>
T atomicAdd(T* address, T value) {
    return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}
inline unsigned atomicInc(unsigned* address, unsigned most) {
    unsigned old = __atomic_load_n(address, __ATOMIC_RELAXED);
    while (!__atomic_compare_exchange_n(address, &old, old >= most ? 0 : old + 1, false, __ATOMIC_RELAXED,
                                        __ATOMIC_RELAXED)) {}
    return old;
}
template <class T>
T atomicExch(T* address, T value) {
    return __atomic_exchange_n(address, value, __ATOMIC_RELAXED);
}
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_system() { __threadfence(); }
inline float __ldcg(const float* address) { return *reinterpret_cast<const volatile float*>(address); }

inline float __uint_as_float(unsigned bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
inline unsigned __float_as_uint(float value) {
    unsigned bits;
    memcpy(&bits, &value, 4);
    return bits;
}
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
    const unsigned long long bytes = (unsigned long long)high << 32 | low;
    unsigned found = 0;
    for (int i = 0; i < 4; i++) found |= unsigned(bytes >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
    return found;
}
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline float __frcp_rn(float a) { return 1.0f / a; }
