// `limner::roi_align` (Mask R-CNN section 3) over a pyramid. The meaning and the order of every float32 operation are
// those of the eager op (torchvision's CPU kernel under models/ops.py), so without fused multiply-adds the bits agree:
//
//   start  = x1 * scale - offset                     offset 0.5 if ALIGNED, else 0; scale = 1 / stride, a power of two
//   length = (x2 * scale - offset) - start           at least 1 unless ALIGNED
//   step   = length / SIZE
//   point  = (start + bin * step) + ((i + 0.5) * step) / points             i of `points` in a bin
//   sum    = sum + (((hh * v00 + hl * v01) + lh * v10) + ll * v11)          rows outer, columns inner; then sum / count
//
// where hh = (1 - ly) * (1 - lx) and so on. A point beyond -1 or beyond the level's side counts as 0; within that it is
// clamped to the border.
//
// Grid: x a RoI, y a slice of its items; ITEMS of them a block. -DSIZE bins a side, -DSAMPLING points a bin and axis
// (0: as many as there are cells), -DALIGNED, -DITEMS, -DTHREADS, and pyramid.cuh's.
#include "pyramid.cuh"

struct Axis {
    float start, step;
    int points;
};

// Weights of the two cells around a point; both 0 where it lies outside.
struct Point {
    int low, high;
    float to_low, to_high;
};

__device__ __forceinline__ Axis axis_of(float low, float high, float scale) {
    const float offset = ALIGNED ? 0.5f : 0.0f;
    const float start = low * scale - offset, end = high * scale - offset;
    float length = end - start;
    if (!ALIGNED && length < 1.0f) length = 1.0f;
    const float step = length / (float)SIZE;
    return {start, step, SAMPLING > 0 ? SAMPLING : (int)ceilf(step)};
}

__device__ __forceinline__ Point point_of(const Axis& axis, int bin, int i, int side) {
    float at = axis.start + bin * axis.step + (i + 0.5f) * axis.step / (float)axis.points;
    if (!(at >= -1.0f && at <= (float)side)) return {0, 0, 0.0f, 0.0f};
    if (at <= 0.0f) at = 0.0f;
    int low = (int)at, high = low + 1;
    if (low >= side - 1) {
        high = low = side - 1;
        at = (float)low;
    }
    const float to_high = at - low;
    return {low, high, 1.0f - to_high, to_high};
}

__device__ __forceinline__ void add(float* sum, const Place& place, int channels, int channel, Point y, Point x) {
    const Lanes v00 = cell(place, channels, channel, y.low, x.low), v01 = cell(place, channels, channel, y.low, x.high);
    const Lanes v10 = cell(place, channels, channel, y.high, x.low);
    const Lanes v11 = cell(place, channels, channel, y.high, x.high);
    const float w00 = y.to_low * x.to_low, w01 = y.to_low * x.to_high;
    const float w10 = y.to_high * x.to_low, w11 = y.to_high * x.to_high;
#pragma unroll
    for (int k = 0; k < LANES; ++k) {
        sum[k] += w00 * widen(v00.at[k]) + w01 * widen(v01.at[k]) + w10 * widen(v10.at[k]) + w11 * widen(v11.at[k]);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    limner_roi_align(FEATURES, const float* __restrict__ rois, int images, int channels, SIDES, Element* output) {
    const float* roi = rois + (size_t)blockIdx.x * 5;
    const Place place = PLACE(roi);
    const Axis across = axis_of(roi[1], roi[3], place.scale), down = axis_of(roi[2], roi[4], place.scale);
#if SAMPLING > 0
    // Every channel is read at the same points, so a block works them out once.
    __shared__ Point rows[SIZE * SAMPLING], columns[SIZE * SAMPLING];
    for (int i = threadIdx.x; i < SIZE * SAMPLING; i += THREADS) {
        rows[i] = point_of(down, i / SAMPLING, i % SAMPLING, place.height);
        columns[i] = point_of(across, i / SAMPLING, i % SAMPLING, place.width);
    }
    __syncthreads();
#endif
    const int per_axis = down.points * across.points, total = channels / LANES * SIZE * SIZE;
    const float count = per_axis > 1 ? per_axis : 1;
    const int end = min(total, (int)(blockIdx.y + 1) * ITEMS);
    Lanes* pooled = reinterpret_cast<Lanes*>(output) + (size_t)blockIdx.x * total;
    for (int index = blockIdx.y * ITEMS + threadIdx.x; index < end; index += THREADS) {
        const Item item = item_of(index, channels);
        float sum[LANES] = {};
        if (place.features != nullptr) {
#if SAMPLING > 0
#pragma unroll
            for (int i = 0; i < SAMPLING; ++i) {
#pragma unroll
                for (int j = 0; j < SAMPLING; ++j) {
                    add(sum, place, channels, item.channel, rows[item.row * SAMPLING + i],
                        columns[item.column * SAMPLING + j]);
                }
            }
#else
            for (int i = 0; i < down.points; ++i) {
                const Point y = point_of(down, item.row, i, place.height);
                for (int j = 0; j < across.points; ++j) {
                    add(sum, place, channels, item.channel, y, point_of(across, item.column, j, place.width));
                }
            }
#endif
        }
        Lanes out;
#pragma unroll
        for (int k = 0; k < LANES; ++k) out.at[k] = narrow(sum[k] / count);
        pooled[index] = out;
    }
}
