// SPDX-License-Identifier: Apache-2.0
// What C++ has no word for: stores and loads of 16 bytes, the clock, launches that overlap, clusters. All of
// the kernels' PTX is here, so that tests can put something else in its place, and run the rest on a CPU.
#pragma once

#include "plan.cuh"

namespace nvrar {

inline void store_16(char* address, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("st.volatile.global.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(address), "r"(a), "r"(b), "r"(c),
                 "r"(d)
                 : "memory");
}

inline void load_16(const char* address, u32& a, u32& b, u32& c, u32& d) {
    asm volatile("ld.volatile.global.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(a), "=r"(b), "=r"(c), "=r"(d)
                 : "l"(address)
                 : "memory");
}

// This thread's 16 bytes of a line of 128, which its seven neighbours complete in the same instruction. By
// all threads of the warp.
inline void store_line_share(char* address, u64 a, u64 b) {
    asm volatile("st.volatile.global.v2.u64 [%0], {%1,%2};" ::"l"(address), "l"(a), "l"(b) : "memory");
}

inline void load_line_share(const char* address, u64& a, u64& b) {
    asm volatile("ld.volatile.global.v2.u64 {%0,%1}, [%2];" : "=l"(a), "=l"(b) : "l"(address) : "memory");
}

inline u64 now_ns() {
    u64 time;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(time));
    return time;
}

// Where launches may overlap: the part of a kernel before this runs while the kernel before it on the stream
// still does, so it may not touch what others write. Everything that one wrote is visible after.
inline void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The kernel after this one may be set up once every block has called this or ended.
inline void launch_dependents() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// The block's dynamic shared memory.
inline char* dynamic_shared() {
    extern __shared__ u64 shared[];
    return reinterpret_cast<char*>(shared);
}

// The blocks that share a row: a cluster, or one.
struct Team {
#if __CUDA_ARCH__ >= 900
    static u32 id() {
        return read([](u32& x) { asm("mov.u32 %0, %clusterid.x;" : "=r"(x)); });
    }
    static u32 number() {
        return read([](u32& x) { asm("mov.u32 %0, %nclusterid.x;" : "=r"(x)); });
    }
    static u32 rank() {
        return read([](u32& x) { asm("mov.u32 %0, %cluster_ctarank;" : "=r"(x)); });
    }
    static u32 size() {
        return read([](u32& x) { asm("mov.u32 %0, %cluster_nctaid.x;" : "=r"(x)); });
    }

    static void meet() {
        asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
        asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
    }
    // Of what members store here.
    static u64 load(const u64* address) { return *reinterpret_cast<const volatile u64*>(address); }
    // Into the shared memory of a member, at the place that `address` is here; 8 bytes arrive whole.
    static void store(u32 member, u64* address, u64 value) {
        if (size() == 1) {
            *reinterpret_cast<volatile u64*>(address) = value;
            return;
        }
        const u32 here = u32(__cvta_generic_to_shared(address));
        u32 there;
        asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(here), "r"(member));
        asm volatile("st.relaxed.cluster.shared::cluster.u64 [%0], %1;" ::"r"(there), "l"(value) : "memory");
    }

  private:
    template <class Read>
    static u32 read(Read into) {
        u32 x;
        into(x);
        return x;
    }
#else
    static u32 id() { return blockIdx.x; }
    static u32 number() { return gridDim.x; }
    static u32 rank() { return 0; }
    static u32 size() { return 1; }
    static void meet() { __syncthreads(); }
    static u64 load(const u64* address) { return *reinterpret_cast<const volatile u64*>(address); }
    static void store(u32, u64* address, u64 value) { *reinterpret_cast<volatile u64*>(address) = value; }
#endif
};

}  // namespace nvrar
