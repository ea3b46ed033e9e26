// SPDX-License-Identifier: Apache-2.0
// The tensor that is reduced, as units of a packet format: where a thread's words are, and how they are
// read and written.
//
// kWhole: the tensor starts and ends at multiples of Packet::kAlign. Otherwise every element is read and
// written on its own: right for any tensor, and kept out of the common kernel, whose size is latency.
#pragma once

#include "packet.cuh"

namespace nvrar {

template <class Packet, class Type, bool kWhole>
struct Message {
    using Payload = typename Packet::Payload;
    static constexpr int kHalves = Packet::kWords == 1 ? 1 : 2;  // stretches of a thread's data in a unit
    static constexpr int kWords = Packet::kWords / kHalves;      // words in each

    static u64 offset(u64 unit, int half) {
        return unit * Packet::kDataBytes + Packet::data_offset(threadIdx.x % Packet::kThreads, half);
    }

    static bool holds(int half) { return Packet::holds_half(threadIdx.x % Packet::kThreads, half); }

    static Payload load(const char* message, u64 unit, u64 num_bytes) {
        Payload value = {};
#pragma unroll
        for (int half = 0; half < kHalves; half++) {
            const u64 at = offset(unit, half);
            if (!holds(half)) continue;
            u64* words = &value.word[half * kWords];
            if constexpr (!kWhole) {
#pragma unroll
                for (int w = 0; w < kWords; w++) words[w] = load_elements(message, at + 8 * w, num_bytes);
            } else if (at < num_bytes) {
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

    static void store(char* message, u64 unit, u64 num_bytes, const Payload& value) {
#pragma unroll
        for (int half = 0; half < kHalves; half++) {
            const u64 at = offset(unit, half);
            if (!holds(half)) continue;
            const u64* words = &value.word[half * kWords];
            if constexpr (!kWhole) {
#pragma unroll
                for (int w = 0; w < kWords; w++) store_elements(message, at + 8 * w, num_bytes, words[w]);
            } else if (at < num_bytes) {
                if constexpr (kWords == 1)
                    *reinterpret_cast<u64*>(message + at) = words[0];
                else
                    *reinterpret_cast<ulonglong2*>(message + at) = make_ulonglong2(words[0], words[1]);
            }
        }
    }

  private:
    using Bits = typename Type::Bits;

    static u64 load_elements(const char* message, u64 at, u64 num_bytes) {
        u64 word = 0;
#pragma unroll
        for (int e = 0; e < 8; e += sizeof(Bits))
            if (at + e < num_bytes) word |= u64(*reinterpret_cast<const Bits*>(message + at + e)) << (8 * e);
        return word;
    }

    static void store_elements(char* message, u64 at, u64 num_bytes, u64 word) {
#pragma unroll
        for (int e = 0; e < 8; e += sizeof(Bits))
            if (at + e < num_bytes) *reinterpret_cast<Bits*>(message + at + e) = Bits(word >> (8 * e));
    }
};

}  // namespace nvrar
