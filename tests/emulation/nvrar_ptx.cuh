// In the place of nvrar/gpu/csrc/ptx.cuh. What the protocol counts on, and nothing that a GPU gives beyond
// it.
#pragma once

#include <time.h>

#include "plan.cuh"

namespace nvrar {

inline void store_8(char* address, u64 value) {
    __atomic_store_n(reinterpret_cast<u64*>(address), value, __ATOMIC_RELEASE);
}
inline u64 load_8(const char* address) {
    return __atomic_load_n(reinterpret_cast<const u64*>(address), __ATOMIC_ACQUIRE);
}

// Only aligned 8 bytes stay whole, and the halves arrive in any order.
inline void store_16(char* address, u32 a, u32 b, u32 c, u32 d) {
    static thread_local unsigned number;
    const bool last_first = number++ % 2;
    if (last_first) store_8(address + 8, u64(d) << 32 | c);
    store_8(address, u64(b) << 32 | a);
    if (number % 7 == 0) emulation::yield();
    if (!last_first) store_8(address + 8, u64(d) << 32 | c);
}
inline void load_16(const char* address, u32& a, u32& b, u32& c, u32& d) {
    emulation::yield();
    const u64 low = load_8(address), high = load_8(address + 8);
    a = u32(low), b = u32(low >> 32), c = u32(high), d = u32(high >> 32);
}

// A line arrives whole: its last 8 bytes are stored last, and loaded first.
inline void store_line_share(char* address, u64 a, u64 b) {
    emulation::Exchange& warp = emulation::exchange();
    const unsigned lane = emulation::lane();
    warp.address[lane] = address;
    warp.word[lane][0] = a, warp.word[lane][1] = b;
    emulation::meet_warp();
    if (lane == 0) {
        for (int last = 0; last < 2; last++)
            for (int i = 0; i < 32; i++) {
                if (i % 8 != 7 && last) continue;
                if (!last) store_8(warp.address[i], warp.word[i][0]);
                if (i % 8 != 7 || last) store_8(warp.address[i] + 8, warp.word[i][1]);
            }
    }
    emulation::meet_warp();
}
inline void load_line_share(const char* address, u64& a, u64& b) {
    emulation::Exchange& warp = emulation::exchange();
    const unsigned lane = emulation::lane();
    warp.address[lane] = const_cast<char*>(address);
    emulation::meet_warp();
    if (lane == 0) {
        emulation::yield();
        for (int i = 7; i < 32; i += 8) warp.word[i][1] = load_8(warp.address[i] + 8);
        for (int i = 0; i < 32; i++) {
            warp.word[i][0] = load_8(warp.address[i]);
            if (i % 8 != 7) warp.word[i][1] = load_8(warp.address[i] + 8);
        }
    }
    emulation::meet_warp();
    a = warp.word[lane][0], b = warp.word[lane][1];
    emulation::meet_warp();
}

inline u64 now_ns() {
    emulation::yield();
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return u64(now.tv_sec) * 1000000000 + now.tv_nsec;
}

inline void wait_for_previous_kernel() {}
inline void launch_dependents() {}

inline char* dynamic_shared() { return emulation::shared_of(emulation::cluster_rank()); }

struct Team {
    static u32 id() { return blockIdx.x / size(); }
    static u32 number() { return gridDim.x / size(); }
    static u32 rank() { return emulation::cluster_rank(); }
    static u32 size() { return emulation::cluster_size(); }
    static void meet() { emulation::meet_cluster(); }
    static u64 load(const u64* address) {
        emulation::yield();
        return load_8(reinterpret_cast<const char*>(address));
    }
    static void store(u32 member, u64* address, u64 value) {
        const u64 at = reinterpret_cast<char*>(address) - dynamic_shared();
        store_8(emulation::shared_of(member) + at, value);
    }
};

#ifdef NVRAR_PUT
// By all threads of the block, as NVSHMEM's: one of them sees to it, and nobody waits.
inline void put_block(char* to, const char* from, u64 num_bytes, int pe) {
    if (threadIdx.x == 0) emulation::put(to, from, num_bytes, pe);
}
#endif

}  // namespace nvrar
