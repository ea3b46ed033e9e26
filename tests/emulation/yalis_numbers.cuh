// numbers.cuh on a CPU: the tensor core's product from what the lanes of a warp hold of it.
#pragma once

#include "cuda_bf16.h"
#include "emulation.h"

namespace yalis {

using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

inline float infinity() { return INFINITY; }

// Where a lane has its rows, columns and sums: the PTX manual's figures of mma.m16n8k16.
template <class Number>
void multiply_in_warp(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    struct Held {
        const u32 *a, *b;
    };
    const Held mine{a, b};
    emulation::Exchange& warp = emulation::exchange();
    warp.address[emulation::lane()] = const_cast<char*>(reinterpret_cast<const char*>(&mine));
    emulation::meet_warp();
    for (u32 i = 0; i < 4; i++) {
        const u32 row = emulation::lane() / 4 + i / 2 * 8, column = emulation::lane() % 4 * 2 + i % 2;
        float sum = 0;
        for (u32 k = 0; k < 16; k++) {
            const auto* of_row = reinterpret_cast<const Held*>(warp.address[row % 8 * 4 + k % 8 / 2]);
            const auto* of_column = reinterpret_cast<const Held*>(warp.address[column * 4 + k % 8 / 2]);
            const u16 left = u16(of_row->a[row / 8 + k / 8 * 2] >> k % 2 * 16);
            const u16 right = u16(of_column->b[k / 8] >> k % 2 * 16);
            sum += Number::widen(left) * Number::widen(right);
        }
        c[i] += sum;
    }
    emulation::meet_warp();
}

struct BFloat16 {
    static float widen(u16 bits) { return widen_bfloat16(bits); }
    static u16 narrow(float value) { return narrow_bfloat16(value); }
    static void multiply(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
        multiply_in_warp<BFloat16>(c, {a0, a1, a2, a3}, {b0, b1});
    }
};

struct Float16 {
    static float widen(u16 bits) {
        _Float16 value;
        memcpy(&value, &bits, 2);
        return float(value);
    }
    static u16 narrow(float value) {
        const _Float16 narrowed = _Float16(value);
        u16 bits;
        memcpy(&bits, &narrowed, 2);
        return bits;
    }
    static void multiply(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
        multiply_in_warp<Float16>(c, {a0, a1, a2, a3}, {b0, b1});
    }
};

}  // namespace yalis
