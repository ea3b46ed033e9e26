// ptx.cuh on a CPU. A copy to shared memory comes as late as it may: when it is waited for.
#pragma once

#include <stdlib.h>

#include <deque>
#include <vector>

#include "emulation.h"
#include "numbers.cuh"

inline unsigned long long __cvta_generic_to_shared(const void* address) {
    return static_cast<const char*>(address) - emulation::shared_of(emulation::cluster_rank());
}

namespace yalis {

struct Vector {
    u32 part[4];
};

struct Copy {
    u32 to;
    const char* from;
    bool is_there;
};

// A thread's: items that are on their way, and the one that is being put together.
struct Queue {
    std::deque<std::vector<Copy>> items;
    std::vector<Copy> next;
};
inline Queue& queue_of_thread() {
    static thread_local std::vector<Queue> queues(1024);  // of a block
    return queues[threadIdx.x];
}

inline void require(bool is_right) {
    if (!is_right) abort();
}

// Whether this thread has waited for the kernel before.
inline char& has_waited() {
    static thread_local std::vector<char> threads(1024);  // of a block
    return threads[threadIdx.x];
}

inline u64 evict_first() { return 0; }
inline void copy_16_bytes(u32 to, const char* from, bool is_there, u64) {
    require(to % 16 == 0 && reinterpret_cast<u64>(from) % 16 == 0);
    queue_of_thread().next.push_back({to, from, is_there});
}
inline void copy_16_bytes(u32 to, const char* from, bool is_there) {  // of no weight
    require(has_waited());
    copy_16_bytes(to, from, is_there, 0);
}

inline void end_item() {
    Queue& queue = queue_of_thread();
    queue.items.push_back(std::move(queue.next));
    queue.next.clear();
}

template <int kPending>
void wait_item() {
    Queue& queue = queue_of_thread();
    for (; queue.items.size() > kPending; queue.items.pop_front())
        for (const Copy& copy : queue.items.front()) {
            char* to = emulation::shared_of(emulation::cluster_rank()) + copy.to;
            if (copy.is_there)
                memcpy(to, copy.from, 16);
            else
                memset(to, 0, 16);
        }
}

inline Vector load_16_bytes(u32 from) {
    Vector v;
    require(from % 16 == 0);
    memcpy(&v, emulation::shared_of(emulation::cluster_rank()) + from, 16);
    return v;
}

inline Vector load_early(const char* from) {
    Vector v;
    require(reinterpret_cast<u64>(from) % 16 == 0);
    memcpy(&v, from, 16);
    return v;
}
inline Vector load_global(const char* from) {
    require(has_waited());
    return load_early(from);
}

inline int load_int(const int* from) { return *from; }

inline void store_global(char* to, const Vector& v) {
    require(has_waited());
    require(reinterpret_cast<u64>(to) % 16 == 0);
    memcpy(to, &v, 16);
}

inline u32 low_halves(u32 first, u32 second) { return __byte_perm(first, second, 0x5410); }
inline u32 high_halves(u32 first, u32 second) { return __byte_perm(first, second, 0x7632); }

inline void let_next_start() { has_waited() = false; }
inline void wait_for_previous() { has_waited() = true; }

}  // namespace yalis
