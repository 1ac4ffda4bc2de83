// What RoIAlign and RoIPool share: the parameters that give a pyramid, which of its levels a RoI belongs to, and how
// values of several channels travel together.
//
// -DLEVELS=1..5, -DFIRST_STRIDE=4 (of f0; each level doubles it), -DCANONICAL (float), -DLEVEL_EDGES={a,b,...}: the
// smallest sqrt(area) / canonical of each level but the first. -DCHANNELS_LAST=0 or 1: features and output alike.
// -DVECTOR: channels of one load where CHANNELS_LAST is 1; divides the number of channels, VECTOR elements <= 16 bytes.
#pragma once
#include "elements.cuh"

#define FEATURES_1 const Element* __restrict__ f0
#define FEATURES_2 FEATURES_1, const Element* __restrict__ f1
#define FEATURES_3 FEATURES_2, const Element* __restrict__ f2
#define FEATURES_4 FEATURES_3, const Element* __restrict__ f3
#define FEATURES_5 FEATURES_4, const Element* __restrict__ f4
#define SIDES_1 int h0, int w0
#define SIDES_2 SIDES_1, int h1, int w1
#define SIDES_3 SIDES_2, int h2, int w2
#define SIDES_4 SIDES_3, int h3, int w3
#define SIDES_5 SIDES_4, int h4, int w4
#define PASTED(a, b) a##b
#define COUNTED(a, b) PASTED(a, b)
#define FEATURES COUNTED(FEATURES_, LEVELS)
#define SIDES COUNTED(SIDES_, LEVELS)

#if CHANNELS_LAST
#define LANES VECTOR
#else
#define LANES 1
#endif

struct alignas(sizeof(Element) * LANES) Lanes {
    Element at[LANES];
};

// A RoI on its own level. A RoI whose area is negative (one side is) has no level: `features` is null, and zeros are
// what it pools, as in the eager op.
struct Place {
    const Element* features;
    int height, width;
    float scale;
};

// x1, y1, x2, y2 of the canvas, in the eager op's order. The root is correctly rounded; torch's on a CPU is at times one
// rounding off, so a RoI within a rounding of a level's edge may have the other level there.
__device__ __forceinline__ int level_of(float x1, float y1, float x2, float y2) {
    const float ratio = sqrtf((x2 - x1) * (y2 - y1)) / CANONICAL;
    if (!(ratio >= 0.0f)) return -1;
    int level = 0;
#if LEVELS > 1
    const float edges[] = LEVEL_EDGES;
#pragma unroll
    for (int i = 0; i < LEVELS - 1; ++i) level += ratio >= edges[i];
#endif
    return level;
}

__device__ __forceinline__ Place place_of(const float* roi, int images, int channels, FEATURES, SIDES) {
    const int level = level_of(roi[1], roi[2], roi[3], roi[4]);
    const int image = (int)roi[0];
    Place place{f0, h0, w0, 1.0f / (FIRST_STRIDE << (level < 0 ? 0 : level))};
#if LEVELS > 1
    if (level == 1) place.features = f1, place.height = h1, place.width = w1;
#endif
#if LEVELS > 2
    if (level == 2) place.features = f2, place.height = h2, place.width = w2;
#endif
#if LEVELS > 3
    if (level == 3) place.features = f3, place.height = h3, place.width = w3;
#endif
#if LEVELS > 4
    if (level == 4) place.features = f4, place.height = h4, place.width = w4;
#endif
    if (level < 0 || image < 0 || image >= images) {
        place.features = nullptr;  // the batch index is data: one that is wrong must not read foreign memory
    } else {
        place.features += (size_t)image * channels * place.height * place.width;
    }
    return place;
}

#if LEVELS == 1
#define PLACE(roi) place_of(roi, images, channels, f0, h0, w0)
#elif LEVELS == 2
#define PLACE(roi) place_of(roi, images, channels, f0, f1, h0, w0, h1, w1)
#elif LEVELS == 3
#define PLACE(roi) place_of(roi, images, channels, f0, f1, f2, h0, w0, h1, w1, h2, w2)
#elif LEVELS == 4
#define PLACE(roi) place_of(roi, images, channels, f0, f1, f2, f3, h0, w0, h1, w1, h2, w2, h3, w3)
#else
#define PLACE(roi) place_of(roi, images, channels, f0, f1, f2, f3, f4, h0, w0, h1, w1, h2, w2, h3, w3, h4, w4)
#endif

// An item is what one thread computes in one step: LANES channels of one bin of SIZE x SIZE. Its order is the output's.
struct Item {
    int channel, row, column;
};

__device__ __forceinline__ Item item_of(int index, int channels) {
#if CHANNELS_LAST
    const int packs = channels / LANES, bin = index / packs;
    return {(index - bin * packs) * LANES, bin / SIZE, bin % SIZE};
#else
    const int bin = index % (SIZE * SIZE);
    return {index / (SIZE * SIZE), bin / SIZE, bin % SIZE};
#endif
}

// LANES channels of the cell (y, x), of one image's features at `place`, from `channel` on.
__device__ __forceinline__ Lanes cell(const Place& place, int channels, int channel, int y, int x) {
#if CHANNELS_LAST
    const size_t at = ((size_t)y * place.width + x) * channels + channel;
#else
    const size_t at = ((size_t)channel * place.height + y) * place.width + x;
#endif
    return *reinterpret_cast<const Lanes*>(place.features + at);
}
