// SPDX-License-Identifier: Apache-2.0
// Turns a head to its token's position, with the bits of kernels/rotary.py: every operation rounded by
// itself.
#pragma once

#include "numbers.cuh"
#include "ptx.cuh"

namespace yalis {

template <class Number>
u16 product(u16 a, u16 b) {
    return Number::narrow(Number::widen(a) * Number::widen(b));
}

template <class Number>
u16 sum(u16 a, u16 b) {
    return Number::narrow(Number::widen(a) + Number::widen(b));
}

// A thread has 8 dimensions of every 32, so i and i + half of the head are both its own; the angles are those
// of its first 8, and of every 32 after them.
template <int kSteps>
struct Angles {
    Vector cos[kSteps / 2], sin[kSteps / 2];

    void load(const char* cos_at, const char* sin_at) {
#pragma unroll
        for (int step = 0; step < kSteps / 2; step++) {
            cos[step] = load_global(cos_at + step * 64);
            sin[step] = load_global(sin_at + step * 64);
        }
    }
};

template <class Number, int kSteps>
void turn(Vector (&vector)[kSteps], const Angles<kSteps>& angles) {
#pragma unroll
    for (int step = 0; step < kSteps / 2; step++) {
        const Vector &c = angles.cos[step], &s = angles.sin[step];
        Vector &low = vector[step], &high = vector[step + kSteps / 2];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            u32 turned_low = 0, turned_high = 0;
#pragma unroll
            for (int shift = 0; shift < 32; shift += 16) {
                const auto half = [shift](u32 both) { return u16(both >> shift); };
                const u16 l = half(low.part[i]), h = half(high.part[i]);
                const u16 cos_of = half(c.part[i]), sin_of = half(s.part[i]);
                const u16 minus = 0x8000;
                turned_low |= u32(sum<Number>(product<Number>(l, cos_of), product<Number>(h ^ minus, sin_of)))
                              << shift;
                turned_high |= u32(sum<Number>(product<Number>(h, cos_of), product<Number>(l, sin_of)))
                               << shift;
            }
            low.part[i] = turned_low;
            high.part[i] = turned_high;
        }
    }
}

}  // namespace yalis
