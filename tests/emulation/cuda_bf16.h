// The little of CUDA's header that kernels use.
#pragma once

#include "emulation.h"

struct __nv_bfloat162 {
    unsigned short x, y;
};
inline float widen_bfloat16(unsigned short bits) { return __uint_as_float(unsigned(bits) << 16); }
inline unsigned short narrow_bfloat16(float value) {
    const unsigned bits = __float_as_uint(value);
    if (value != value) return 0x7fff;
    return (unsigned short)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline float2 __bfloat1622float2(__nv_bfloat162 a) { return {widen_bfloat16(a.x), widen_bfloat16(a.y)}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
    return {narrow_bfloat16(x), narrow_bfloat16(y)};
}
inline __nv_bfloat162 __hadd2(__nv_bfloat162 a, __nv_bfloat162 b) {
    const float2 x = __bfloat1622float2(a), y = __bfloat1622float2(b);
    return __floats2bfloat162_rn(x.x + y.x, x.y + y.y);
}
inline __nv_bfloat162 __hmul2(__nv_bfloat162 a, __nv_bfloat162 b) {
    const float2 x = __bfloat1622float2(a), y = __bfloat1622float2(b);
    return __floats2bfloat162_rn(x.x * y.x, x.y * y.y);
}
