// The little of CUDA's header that kernels use.
#pragma once

#include "emulation.h"

struct __half2 {
    _Float16 x, y;
};
inline float2 __half22float2(__half2 a) { return {float(a.x), float(a.y)}; }
inline __half2 __floats2half2_rn(float x, float y) { return {_Float16(x), _Float16(y)}; }
inline __half2 __hadd2(__half2 a, __half2 b) {
    return __floats2half2_rn(float(a.x) + float(b.x), float(a.y) + float(b.y));
}
inline __half2 __hmul2(__half2 a, __half2 b) {
    return __floats2half2_rn(float(a.x) * float(b.x), float(a.y) * float(b.y));
}
