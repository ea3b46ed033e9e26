// SPDX-License-Identifier: Apache-2.0
// The tensor that is reduced, as units of a packet format: where a thread's words of one unit are, and how
// they are read and written. `unit` is the offset in bytes at which the unit starts, `limit` that at which
// the message, or the row that the unit is of, ends.
//
// kWhole: the tensor starts and ends at multiples of what a thread takes at once (align_bytes in layout.py).
// Otherwise every element is read and written on its own: right for any tensor, and kept out of the common
// kernel, whose size is latency.
#pragma once

#include "types.cuh"
#include "wait.cuh"

namespace nvrar {

template <class Packet, class Type, bool kWhole>
struct Message {
    using Payload = typename Packet::Payload;
    static constexpr int kHalves = Packet::kWords == 1 ? 1 : 2;  // stretches of a thread's data in a unit
    static constexpr int kWords = Packet::kWords / kHalves;      // words in each

    static u64 offset(u64 unit, int half) {
        return unit + Packet::data_offset(threadIdx.x % Packet::kThreads, half);
    }

    static bool holds(int half) { return Packet::holds_half(threadIdx.x % Packet::kThreads, half); }

    static Payload load(const char* message, u64 unit, u64 limit) {
        Payload value = {};
#pragma unroll
        for (int half = 0; half < kHalves; half++) {
            const u64 at = offset(unit, half);
            if (!holds(half)) continue;
            u64* words = &value.word[half * kWords];
            if constexpr (!kWhole) {
#pragma unroll
                for (int w = 0; w < kWords; w++) words[w] = load_elements(message, at + 8 * w, limit);
            } else if (at < limit) {
                if constexpr (kWords == 1) {
                    words[0] = *reinterpret_cast<const u64*>(message + at);
                } else {
                    const ulonglong2 pair = *reinterpret_cast<const ulonglong2*>(message + at);
                    words[0] = pair.x;
                    words[1] = pair.y;
                }
            }
        }
        return value;
    }

    static void store(char* message, u64 unit, u64 limit, const Payload& value) {
#pragma unroll
        for (int half = 0; half < kHalves; half++) {
            const u64 at = offset(unit, half);
            if (!holds(half)) continue;
            const u64* words = &value.word[half * kWords];
            if constexpr (!kWhole) {
#pragma unroll
                for (int w = 0; w < kWords; w++) store_elements(message, at + 8 * w, limit, words[w]);
            } else if (at < limit) {
                if constexpr (kWords == 1)
                    *reinterpret_cast<u64*>(message + at) = words[0];
                else
                    *reinterpret_cast<ulonglong2*>(message + at) = make_ulonglong2(words[0], words[1]);
            }
        }
    }

  private:
    using Bits = typename Type::Bits;

    static u64 load_elements(const char* message, u64 at, u64 limit) {
        u64 word = 0;
#pragma unroll
        for (int e = 0; e < 8; e += sizeof(Bits))
            if (at + e < limit) word |= u64(*reinterpret_cast<const Bits*>(message + at + e)) << (8 * e);
        return word;
    }

    static void store_elements(char* message, u64 at, u64 limit, u64 word) {
#pragma unroll
        for (int e = 0; e < 8; e += sizeof(Bits))
            if (at + e < limit) *reinterpret_cast<Bits*>(message + at + e) = Bits(word >> (8 * e));
    }
};

// The whole tensor as one stretch, part after part; the sum is the result.
template <class Plan, class Packet, class Type, bool kWhole>
class Flat {
    using Words = Message<Packet, Type, kWhole>;

  public:
    using Payload = typename Packet::Payload;

    explicit Flat(const Args<Plan>& args) : args_(args) {}

    Payload load(int part, u32 unit, bool live) const {
        return Words::load(args_.in, start(part, unit), live ? args_.num_bytes : 0);
    }
    void store(int part, u32 unit, const Payload& value) const {
        Words::store(args_.out, start(part, unit), args_.num_bytes, value);
    }

  private:
    u64 start(int part, u32 unit) const { return (u64(part) * args_.num_units + unit) * Packet::kDataBytes; }

    const Args<Plan>& args_;
};

}  // namespace nvrar
