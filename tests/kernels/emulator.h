// A GPU for tests: runs a kernel's own source on the CPU, one block after the other, its threads as fibers that give way
// at barriers. What CUDA leaves open is made to fail loudly here: a barrier that not all threads reach aborts.
#pragma once
#define EMULATED

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // blocks run one after the other, so one copy is enough
#define __restrict__

struct dim3 {
    unsigned x, y, z;
};
struct alignas(16) float4 {
    float x, y, z, w;
};

namespace emulator {

enum Wait { READY, BLOCK, WARP, DONE };

struct Fiber {
    ucontext_t context;
    std::vector<char> stack;
    dim3 index;
    Wait wait = READY;
    unsigned vote = 0;
};

inline dim3 block_index, block_size, grid_size;
inline std::vector<Fiber> fibers;
inline Fiber* current = nullptr;
inline ucontext_t scheduler;
inline std::function<void()> body;

inline void give_way(Wait reason) {
    Fiber* self = current;
    self->wait = reason;
    swapcontext(&self->context, &scheduler);
}

inline void enter() {
    body();
    give_way(DONE);
}

inline unsigned number(const Fiber& fiber) { return unsigned(&fiber - fibers.data()); }

// Lets threads [first, last) go on if each of them waits for `reason`; threads that are done do not count.
inline bool release(size_t first, size_t last, Wait reason) {
    bool any = false;
    for (size_t i = first; i < last; ++i) {
        if (fibers[i].wait == READY || (fibers[i].wait != reason && fibers[i].wait != DONE)) return false;
        any |= fibers[i].wait == reason;
    }
    for (size_t i = first; any && i < last; ++i) {
        if (fibers[i].wait == reason) fibers[i].wait = READY;
    }
    return any;
}

inline void run_block() {
    const size_t count = (size_t)block_size.x * block_size.y * block_size.z;
    if (fibers.size() != count) fibers = std::vector<Fiber>(count);
    for (size_t i = 0; i < count; ++i) {
        Fiber& fiber = fibers[i];
        fiber.stack.resize(64 << 10);
        fiber.index = {unsigned(i % block_size.x), unsigned(i / block_size.x), 0};
        fiber.wait = READY;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.data();
        fiber.context.uc_stack.ss_size = fiber.stack.size();
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, enter, 0);
    }
    for (bool moved = true; moved;) {
        moved = false;
        for (size_t first = 0; first < count; first += 32) {
            const size_t last = first + 32 < count ? first + 32 : count;
            do {
                for (size_t i = first; i < last; ++i) {
                    if (fibers[i].wait != READY) continue;
                    current = &fibers[i];
                    moved = true;
                    swapcontext(&scheduler, &fibers[i].context);
                }
            } while (release(first, last, WARP));
        }
        moved |= release(0, count, BLOCK);
    }
    for (const Fiber& fiber : fibers) {
        if (fiber.wait != DONE) {
            std::fprintf(stderr, "thread %u waits at a barrier that others do not reach\n", number(fiber));
            std::abort();
        }
    }
}

// `arguments` as for cuLaunchKernel: a pointer to each of the kernel's arguments.
template <class... A, size_t... I>
void launch(void (*kernel)(A...), dim3 grid, dim3 block, void** arguments, std::index_sequence<I...>) {
    grid_size = grid, block_size = block;
    body = [=] { kernel(*static_cast<A*>(arguments[I])...); };
    for (unsigned z = 0; z < grid.z; ++z) {
        for (unsigned y = 0; y < grid.y; ++y) {
            for (unsigned x = 0; x < grid.x; ++x) {
                block_index = {x, y, z};
                run_block();
            }
        }
    }
}

template <class... A>
void launch(void (*kernel)(A...), const unsigned* sizes, void** arguments) {
    launch(kernel, dim3{sizes[0], sizes[1], sizes[2]}, dim3{sizes[3], sizes[4], sizes[5]}, arguments,
           std::index_sequence_for<A...>{});
}

}  // namespace emulator

#define threadIdx (emulator::current->index)
#define blockIdx emulator::block_index
#define blockDim emulator::block_size
#define gridDim emulator::grid_size

inline void __syncthreads() { emulator::give_way(emulator::BLOCK); }

inline unsigned __ballot_sync(unsigned, bool vote) {
    using namespace emulator;
    current->vote = vote;
    give_way(WARP);
    const unsigned first = number(*current) / 32 * 32;
    unsigned votes = 0;
    for (unsigned i = 0; i < 32 && first + i < fibers.size(); ++i) votes |= fibers[first + i].vote << i;
    give_way(WARP);  // nobody votes again before everybody has counted
    return votes;
}

inline int atomicAdd(int* at, int value) { return std::exchange(*at, *at + value); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }

template <class To, class From>
To same_bits(From from) {
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}
inline unsigned __float_as_uint(float value) { return same_bits<unsigned>(value); }
inline float __uint_as_float(unsigned bits) { return same_bits<float>(bits); }

#if defined(ELEMENT) && ELEMENT == 2
inline float widen(unsigned short value) { return __uint_as_float((unsigned)value << 16); }
inline unsigned short narrow(float value) {  // to the nearest, ties to even
    const unsigned bits = __float_as_uint(value);
    return (unsigned short)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
#elif defined(ELEMENT) && ELEMENT == 1
inline float widen(unsigned short value) {
    const int exponent = value >> 10 & 31, fraction = value & 1023;
    const float size = exponent ? std::ldexp(1024.0f + fraction, exponent - 25) : std::ldexp((float)fraction, -24);
    return value & 0x8000 ? -size : size;
}
inline unsigned short narrow(float value) {  // finite values; nearbyint rounds ties to even
    const float size = std::fabs(value);
    const unsigned short sign = std::signbit(value) ? 0x8000 : 0;
    if (size >= 65520.0f) return sign | 0x7c00;
    if (size == 0.0f) return sign;
    int exponent;
    std::frexp(size, &exponent);
    if (exponent < -13) exponent = -13;  // a subnormal's steps
    const int steps = (int)std::nearbyint(std::ldexp(size, 11 - exponent));
    return (unsigned short)(sign | ((exponent + 13) * 1024 + steps));
}
#endif
