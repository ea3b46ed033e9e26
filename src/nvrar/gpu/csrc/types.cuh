// SPDX-License-Identifier: Apache-2.0
// Element types: how an 8-byte word of a message is widened, combined and rounded.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "plan.cuh"

namespace nvrar {

// Each type has kPerWord elements of kBytes in a word, an Acc to add them in, and a word to leave where the
// result is not to be had: NaN, or for integers, which have none, the most negative.
struct Float32 {
    using Acc = float;
    using Bits = u32;
    static constexpr int kPerWord = 2;
    static constexpr u64 kPoison = 0x7fc000007fc00000ull;
    static void widen(u64 word, Acc* wide) {
        wide[0] = __uint_as_float(u32(word));
        wide[1] = __uint_as_float(u32(word >> 32));
    }
    static u64 narrow(const Acc* wide) {
        return u64(__float_as_uint(wide[1])) << 32 | __float_as_uint(wide[0]);
    }
    // Element by element.
    static u64 add(u64 a, u64 b) {
        return combine(a, b, [](float x, float y) { return __fadd_rn(x, y); });
    }
    static u64 multiply(u64 a, u64 b) {
        return combine(a, b, [](float x, float y) { return __fmul_rn(x, y); });
    }

  private:
    template <class Combine>
    static u64 combine(u64 a, u64 b, Combine op) {
        Acc x[2], y[2];
        widen(a, x);
        widen(b, y);
        x[0] = op(x[0], y[0]);
        x[1] = op(x[1], y[1]);
        return narrow(x);
    }
};

struct Int32 {
    using Acc = int;
    using Bits = u32;
    static constexpr int kPerWord = 2;
    static constexpr u64 kPoison = 0x8000000080000000ull;
    static void widen(u64 word, Acc* wide) {
        wide[0] = int(u32(word));
        wide[1] = int(u32(word >> 32));
    }
    static u64 narrow(const Acc* wide) { return u64(u32(wide[1])) << 32 | u32(wide[0]); }
};

// 16-bit types go two at a time: a conversion of one costs as much as of two.
template <class Pair, float2 (*kWiden)(Pair), Pair (*kNarrow)(float, float), u64 kPoison_>
struct Float16Bits {
    using Acc = float;
    using Bits = unsigned short;
    static constexpr int kPerWord = 4;
    static constexpr u64 kPoison = kPoison_;
    static void widen(u64 word, Acc* wide) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const u32 bits = u32(word >> (32 * half));
            Pair pair;
            memcpy(&pair, &bits, 4);
            const float2 both = kWiden(pair);
            wide[2 * half] = both.x;
            wide[2 * half + 1] = both.y;
        }
    }
    static u64 narrow(const Acc* wide) {
        const Pair pairs[2] = {kNarrow(wide[0], wide[1]), kNarrow(wide[2], wide[3])};
        u64 word;
        memcpy(&word, pairs, 8);
        return word;
    }
    // Element by element, with the bits of fp32 and then rounding: fp32 has more than twice their digits.
    static u64 add(u64 a, u64 b) {
        return combine(a, b, [](Pair x, Pair y) { return __hadd2(x, y); });
    }
    static u64 multiply(u64 a, u64 b) {
        return combine(a, b, [](Pair x, Pair y) { return __hmul2(x, y); });
    }

  private:
    template <class Combine>
    static u64 combine(u64 a, u64 b, Combine op) {
        Pair x[2], y[2];
        memcpy(x, &a, 8);
        memcpy(y, &b, 8);
        x[0] = op(x[0], y[0]);
        x[1] = op(x[1], y[1]);
        memcpy(&a, x, 8);
        return a;
    }
};

using BFloat16 =
    Float16Bits<__nv_bfloat162, __bfloat1622float2, __floats2bfloat162_rn, 0x7fc07fc07fc07fc0ull>;
using Float16 = Float16Bits<__half2, __half22float2, __floats2half2_rn, 0x7e007e007e007e00ull>;

struct Sum {
    static constexpr bool kCommutes = true;
    template <class T>
    static T apply(T a, T b) {
        return a + b;
    }
};

// Keeps the first of equals, so of -0.0 and 0.0, and the first NaN: the same bits wherever it is computed.
struct Max {
    static constexpr bool kCommutes = false;
    static float apply(float a, float b) { return a == a && (b > a || b != b) ? b : a; }
    static int apply(int a, int b) { return b > a ? b : a; }
};

template <class Type, class Op, int kWords>
struct Accumulator {
    static constexpr int kPerWord = Type::kPerWord;
    typename Type::Acc acc[kWords * kPerWord];

    void start(const u64 (&words)[kWords]) {
#pragma unroll
        for (int w = 0; w < kWords; w++) Type::widen(words[w], acc + w * kPerWord);
    }

    void add(const u64 (&words)[kWords]) {
#pragma unroll
        for (int w = 0; w < kWords; w++) {
            typename Type::Acc wide[kPerWord];
            Type::widen(words[w], wide);
#pragma unroll
            for (int e = 0; e < kPerWord; e++)
                acc[w * kPerWord + e] = Op::apply(acc[w * kPerWord + e], wide[e]);
        }
    }

    void finish(u64 (&words)[kWords]) const {
#pragma unroll
        for (int w = 0; w < kWords; w++) words[w] = Type::narrow(acc + w * kPerWord);
    }
};

}  // namespace nvrar
