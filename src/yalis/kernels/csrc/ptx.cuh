// SPDX-License-Identifier: Apache-2.0
// Instructions that C++ has no word for: copies that run by themselves, and kernels that overlap.
#pragma once

#include "numbers.cuh"

namespace yalis {

// Where the L2 cache makes room first: in what is read once.
inline u64 evict_first() {
    u64 policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0;" : "=l"(policy));
    return policy;
}

// Starts a copy to shared memory; zeros are written where nothing is there.
inline void copy_16_bytes(u32 to, const char* from, bool is_there, u64 policy) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(to), "l"(from),
                 "r"(is_there ? 16 : 0), "l"(policy)
                 : "memory");
}

inline void copy_16_bytes(u32 to, const char* from, bool is_there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(is_there ? 16 : 0)
                 : "memory");
}

inline void end_item() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int kPending>
void wait_item() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

struct Vector {
    u32 part[4];
};

inline Vector load_16_bytes(u32 from) {
    Vector v;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.part[0]), "=r"(v.part[1]), "=r"(v.part[2]), "=r"(v.part[3])
                 : "r"(from)
                 : "memory");
    return v;
}

// Of memory that others write while this kernel is there: not from the multiprocessor's own cache.
inline Vector load_global(const char* from) {
    Vector v;
    asm volatile("ld.global.cg.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.part[0]), "=r"(v.part[1]), "=r"(v.part[2]), "=r"(v.part[3])
                 : "l"(from));
    return v;
}

// The same before the wait: of what was written before the last ordinary launch.
inline Vector load_early(const char* from) { return load_global(from); }

inline int load_int(const int* from) {
    int value;
    asm volatile("ld.global.cg.b32 %0, [%1];" : "=r"(value) : "l"(from));
    return value;
}

inline void store_global(char* to, const Vector& v) {
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(v.part[0]), "r"(v.part[1]),
                 "r"(v.part[2]), "r"(v.part[3])
                 : "memory");
}

// The low, and the high, 16 bits of both, the first's below.
inline u32 low_halves(u32 first, u32 second) { return __byte_perm(first, second, 0x5410); }
inline u32 high_halves(u32 first, u32 second) { return __byte_perm(first, second, 0x7632); }

// Lets the next kernel start once every block has come so far. kernels/launch.py has the rule.
inline void let_next_start() { asm volatile("griddepcontrol.launch_dependents;"); }

// Waits until all earlier kernels have ended and their writes are visible.
inline void wait_for_previous() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

}  // namespace yalis
