// `limner::nms` in two launches without workspace: each group is thinned on its own, then the groups are merged.
// Nothing outside sorts: a group is filtered and sorted here, by score and then by index, so ties go to the lower index
// whatever a library's sort or top-k does with them. The IoU is torchvision's, operation by operation; compiled without
// fused multiply-adds its bits are the eager op's.
//
// -DCAPACITY: a power of two >= the boxes of a group, <= 4096; -DTHREADS = CAPACITY / 2 within 64..1024.
// -DSCORE_FLOOR, -DMAX_IOU (floats): a score must be above the one, an IoU above the other suppresses; MAX_IOU >= 0.
// -DINDEX: the integer type of what the merge writes.

#define CHUNK 64
#define MERGE_THREADS 128
#define MINUS_INFINITY __uint_as_float(0xff800000u)

typedef unsigned long long Key;

// Ascending keys are descending scores, then ascending indices. Adding 0 makes one of the two zeros.
__device__ __forceinline__ Key key_of(float score, int index) {
    const unsigned bits = __float_as_uint(score + 0.0f);
    const unsigned ascending = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return (Key)~ascending << 32 | (unsigned)index;
}

__device__ __forceinline__ int index_of(Key key) { return (int)(unsigned)key; }

__device__ __forceinline__ float score_of(Key key) {
    const unsigned ascending = ~(unsigned)(key >> 32);
    return __uint_as_float(ascending & 0x80000000u ? ascending & 0x7fffffffu : ~ascending);
}

__device__ __forceinline__ float area_of(float4 box) { return (box.z - box.x) * (box.w - box.y); }

__device__ __forceinline__ bool overlaps(float4 a, float area_a, float4 b, float area_b) {
    const float left = a.x < b.x ? b.x : a.x, top = a.y < b.y ? b.y : a.y;
    const float right = b.z < a.z ? b.z : a.z, bottom = b.w < a.w ? b.w : a.w;
    const float width = 0.0f < right - left ? right - left : 0.0f;
    const float height = 0.0f < bottom - top ? bottom - top : 0.0f;
    const float both = width * height;
    // Most pairs end here, before the division: a quotient of 0 is above no threshold.
    return both > 0.0f && both / (area_a + area_b - both) > MAX_IOU;
}

__device__ __forceinline__ void sort(Key* keys, int count) {  // bitonic; count a power of two
    for (int run = 2; run <= count; run *= 2) {
        for (int stride = run / 2; stride > 0; stride /= 2) {
            __syncthreads();
            for (int i = threadIdx.x; i < count / 2; i += THREADS) {
                const int low = i / stride * 2 * stride + i % stride, high = low + stride;
                const Key a = keys[low], b = keys[high];
                if ((a > b) == ((low & run) == 0)) keys[low] = b, keys[high] = a;
            }
        }
    }
    __syncthreads();
}

// Grid: x groups, y images. boxes (B, G, size, 4), scores (B, G, size) -> the first `keep` survivors of each group, best
// first: kept (B, G, keep) index within the group, kept_scores (B, G, keep), kept_count (B, G); past it 0 and -inf.
//
// Boxes go by in chunks of 64, best first. A warp's ballots say which of a chunk suppresses which, one warp resolves
// that in order, and then every thread holds the later boxes against the chunk's survivors.
extern "C" __global__ void __launch_bounds__(THREADS)
    limner_nms_groups(const float4* __restrict__ boxes, const float* __restrict__ scores, int size, int keep, int* kept,
                      float* kept_scores, int* kept_count) {
    __shared__ Key keys[CAPACITY];
    __shared__ unsigned char gone[CAPACITY];
    __shared__ float4 chunk[CHUNK];
    __shared__ float areas[CHUNK];
    __shared__ unsigned suppresses[CHUNK][2];
    __shared__ int winners[CHUNK];
    __shared__ int num_candidates, num_winners;

    const int group = blockIdx.y * gridDim.x + blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    boxes += (size_t)group * size, scores += (size_t)group * size;
    kept += (size_t)group * keep, kept_scores += (size_t)group * keep;

    if (threadIdx.x == 0) num_candidates = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < size; i += THREADS) {
        const float score = scores[i];
        if (score > SCORE_FLOOR) keys[atomicAdd(&num_candidates, 1)] = key_of(score, i);
    }
    __syncthreads();
    const int count = num_candidates;
    int padded = 1;
    while (padded < count) padded *= 2;
    for (int i = count + threadIdx.x; i < padded; i += THREADS) keys[i] = ~(Key)0;
    for (int i = threadIdx.x; i < count; i += THREADS) gone[i] = 0;
    sort(keys, padded);

    int taken = 0;
    for (int first = 0; first < count && taken < keep; first += CHUNK) {
        const int here = min(CHUNK, count - first);
        for (int i = threadIdx.x; i < here; i += THREADS) {
            chunk[i] = boxes[index_of(keys[first + i])];
            areas[i] = area_of(chunk[i]);
        }
        __syncthreads();
        for (int row = warp; row < here; row += THREADS / 32) {
            if (gone[first + row]) continue;  // the whole warp skips it
            for (int half = 0; half < 2; ++half) {
                const int other = half * 32 + lane;
                const bool hit = other > row && other < here &&
                                 overlaps(chunk[row], areas[row], chunk[other], areas[other]);
                const unsigned hits = __ballot_sync(0xffffffffu, hit);
                if (lane == 0) suppresses[row][half] = hits;
            }
        }
        __syncthreads();
        if (warp == 0) {
            unsigned alive[2];
            for (int half = 0; half < 2; ++half) {
                const int i = half * 32 + lane;
                alive[half] = __ballot_sync(0xffffffffu, i < here && !gone[first + i]);
            }
            for (int row = 0; row < here; ++row) {
                if (alive[row / 32] >> row % 32 & 1) {
                    alive[0] &= ~suppresses[row][0];
                    alive[1] &= ~suppresses[row][1];
                }
            }
            const int room = keep - taken;
            for (int half = 0; half < 2; ++half) {
                const unsigned before = alive[half] & ((1u << lane) - 1);
                const int place = (half ? __popc(alive[0]) : 0) + __popc(before);
                if ((alive[half] >> lane & 1) && place < room) {
                    const Key key = keys[first + half * 32 + lane];
                    winners[place] = half * 32 + lane;
                    kept[taken + place] = index_of(key);
                    kept_scores[taken + place] = score_of(key);
                }
            }
            if (lane == 0) num_winners = min(__popc(alive[0]) + __popc(alive[1]), room);
        }
        __syncthreads();
        for (int i = first + CHUNK + threadIdx.x; i < count; i += THREADS) {
            if (gone[i]) continue;
            const float4 box = boxes[index_of(keys[i])];
            const float area = area_of(box);
            for (int k = 0; k < num_winners; ++k) {
                if (overlaps(chunk[winners[k]], areas[winners[k]], box, area)) {
                    gone[i] = 1;
                    break;
                }
            }
        }
        taken += num_winners;
        __syncthreads();
    }
    for (int i = taken + threadIdx.x; i < keep; i += THREADS) kept[i] = 0, kept_scores[i] = MINUS_INFINITY;
    if (threadIdx.x == 0) kept_count[group] = taken;
}

// How many of a descending list are before `score`: above it, or as high too where `equal`.
__device__ __forceinline__ int num_before(const float* scores, int count, float score, bool equal) {
    int low = 0, high = count;
    while (low < high) {
        const int middle = (low + high) / 2;
        if (scores[middle] > score || (equal && scores[middle] == score)) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low;
}

// Grid: x groups, y images. What the groups kept -> indices (B, keep) into G * size, best first, 0 past count; count
// (B,). A survivor's rank is its place in its own group plus the number of better ones in each other group.
extern "C" __global__ void __launch_bounds__(MERGE_THREADS)
    limner_nms_merge(const int* __restrict__ kept, const float* __restrict__ kept_scores,
                     const int* __restrict__ kept_count, int size, int group_keep, int keep, INDEX* indices,
                     INDEX* count) {
    const int groups = gridDim.x, group = blockIdx.x, image = blockIdx.y;
    kept += (size_t)image * groups * group_keep, kept_scores += (size_t)image * groups * group_keep;
    kept_count += (size_t)image * groups, indices += (size_t)image * keep;

    for (int i = threadIdx.x; i < kept_count[group]; i += MERGE_THREADS) {
        const float score = kept_scores[(size_t)group * group_keep + i];
        int rank = i;
        for (int other = 0; other < groups && rank < keep; ++other) {
            if (other == group) continue;
            rank += num_before(kept_scores + (size_t)other * group_keep, kept_count[other], score, other < group);
        }
        if (rank < keep) indices[rank] = (INDEX)group * size + kept[(size_t)group * group_keep + i];
    }
    if (group != 0) return;
    int total = 0;
    for (int i = 0; i < groups && total < keep; ++i) total += kept_count[i];
    total = min(total, keep);
    for (int i = total + threadIdx.x; i < keep; i += MERGE_THREADS) indices[i] = 0;
    if (threadIdx.x == 0) count[image] = total;
}
