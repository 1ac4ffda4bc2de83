// RoIPool (Fast R-CNN section 2.1): the largest value of each bin of whole cells, as torchvision's CPU kernel has it.
// Corners are rounded half away from zero and both belong to the RoI, so it is at least one cell; bins may share cells;
// a bin outside the level is 0. Parameters, layouts, levels, grid and defines are those of roi_align.cu, less SAMPLING
// and ALIGNED.
#include "pyramid.cuh"

struct Span {
    int low, high;
};

__device__ __forceinline__ Span span_of(float low, float high, float scale, int bin, int side) {
    const int start = (int)roundf(low * scale), length = max((int)roundf(high * scale) - start + 1, 1);
    const float step = (float)length / (float)SIZE;
    const int from = (int)floorf((float)bin * step) + start, to = (int)ceilf((float)(bin + 1) * step) + start;
    return {min(max(from, 0), side), min(max(to, 0), side)};
}

extern "C" __global__ void __launch_bounds__(THREADS)
    limner_roi_pool(FEATURES, const float* __restrict__ rois, int images, int channels, SIDES, Element* output) {
    const float* roi = rois + (size_t)blockIdx.x * 5;
    const Place place = PLACE(roi);
    const int total = channels / LANES * SIZE * SIZE;
    const int end = min(total, (int)(blockIdx.y + 1) * ITEMS);
    Lanes* pooled = reinterpret_cast<Lanes*>(output) + (size_t)blockIdx.x * total;
    for (int index = blockIdx.y * ITEMS + threadIdx.x; index < end; index += THREADS) {
        const Item item = item_of(index, channels);
        const Span y = span_of(roi[2], roi[4], place.scale, item.row, place.height);
        const Span x = span_of(roi[1], roi[3], place.scale, item.column, place.width);
        const bool empty = place.features == nullptr || y.high <= y.low || x.high <= x.low;
        float best[LANES];
#pragma unroll
        for (int k = 0; k < LANES; ++k) best[k] = empty ? 0.0f : -3.402823466e+38f;
        for (int i = y.low; i < y.high && !empty; ++i) {
            for (int j = x.low; j < x.high; ++j) {
                const Lanes value = cell(place, channels, item.channel, i, j);
#pragma unroll
                for (int k = 0; k < LANES; ++k) best[k] = widen(value.at[k]) > best[k] ? widen(value.at[k]) : best[k];
            }
        }
        Lanes out;
#pragma unroll
        for (int k = 0; k < LANES; ++k) out.at[k] = narrow(best[k]);
        pooled[index] = out;
    }
}
