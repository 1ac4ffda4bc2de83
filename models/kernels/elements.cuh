// The element types of feature maps. Sums are float32 in every precision; no CUDA header is needed, so NVRTC alone
// compiles what includes this. -DELEMENT=0 float32, 1 float16, 2 bfloat16.
#pragma once

#if ELEMENT == 0
typedef float Element;
__device__ __forceinline__ float widen(Element value) { return value; }
__device__ __forceinline__ Element narrow(float value) { return value; }
#else
typedef unsigned short Element;
#ifdef EMULATED  // the tests' stand-in for a GPU brings its own conversions
__device__ float widen(Element value);
__device__ Element narrow(float value);
#elif ELEMENT == 1
__device__ __forceinline__ float widen(Element value) {
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value));
    return wide;
}
__device__ __forceinline__ Element narrow(float value) {
    Element bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}
#else
__device__ __forceinline__ float widen(Element value) { return __uint_as_float((unsigned)value << 16); }
__device__ __forceinline__ Element narrow(float value) {
    Element bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}
#endif
#endif
