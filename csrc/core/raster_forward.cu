// One thread per pixel: search the cells in reach, keep the nearest points in registers, blend them.
#include "raster_bins.cuh"

namespace fvgen {
namespace {

constexpr int kTileX = 16, kTileY = 8;  // a warp covers 8 x 4 pixels, a block 16 x 8
constexpr int kThreads = kTileX * kTileY;
constexpr int kQueue = 8;  // hits a thread collects before it inserts them, so that the lanes of a warp insert together
constexpr unsigned kWarp = 0xffffffffu;
constexpr uint64_t kEmpty = ~uint64_t(0);

struct ForwardParams {
  RasterCloud cloud;
  Grid grid;
  Bins bins;
  RasterFragments out;
  RasterBlend blend;
  float* image;  // [V, H, W, C]
  float* depth;  // [V, H, W]
};

// The N smallest keys in ascending order. Depth bits above the index: depths are >= 0, so the key orders by (depth, index), and
// the result does not depend on the order of insertion.
template <int N>
struct Nearest {
  uint64_t key[N];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int k = 0; k < N; ++k) key[k] = kEmpty;
  }

  __device__ __forceinline__ void add(uint64_t x) {
    if (x >= key[N - 1]) return;
#pragma unroll
    for (int k = N - 1; k > 0; --k) {
      key[k] = x < key[k - 1] ? key[k - 1] : (x < key[k] ? x : key[k]);
    }
    key[0] = x < key[0] ? x : key[0];
  }
};

// N slots are kept (at least out.slots). kChannels: channels blended at a time; 0 = fragments only.
template <int N, bool kWorld, int kChannels>
__global__ void __launch_bounds__(kThreads) raster_kernel(ForwardParams p) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
  const int col = blockIdx.x * kTileX + (warp & 1) * 8 + (lane & 7);
  const int row = blockIdx.y * kTileY + (warp >> 1) * 4 + (lane >> 3);
  const int v = blockIdx.z;
  const int height = p.cloud.height, width = p.cloud.width;
  const bool inside = col < width && row < height;  // the others stay for the votes of their warp
  const float xf = pixel_center(col, width, p.grid.extent_x);
  const float yf = pixel_center(row, height, p.grid.extent_y);
  const int* start = p.bins.start + v * (int64_t(height) * width + 1);
  const float4* records = p.bins.records + int64_t(v) * p.cloud.count;

  __shared__ uint64_t queue[kQueue][kThreads];
  int queued = 0;
  Nearest<N> nearest;
  nearest.clear();
  auto insert_queued = [&] {
    for (int j = 0; __any_sync(kWarp, j < queued); ++j) {
      if (j < queued) nearest.add(queue[j][threadIdx.x]);
    }
    queued = 0;
  };
  auto test = [&](const float4& q) {
    if (!(squared_distance(xf, yf, q.x, q.y) < p.grid.radius2)) return;
    const uint64_t key = uint64_t(__float_as_uint(q.z)) << 32 | __float_as_uint(q.w);
    if (key < nearest.key[N - 1]) queue[queued++][threadIdx.x] = key;
  };

  const float reach = p.grid.reach;
  const int rows = int(fminf(floorf(reach + 0.5f), float(height)));
  const int top = blockIdx.y * kTileY + (warp >> 1) * 4;  // of the warp: all lanes run through the same rows
  for (int r = max(top - rows, 0); r <= min(top + 3 + rows, height - 1); ++r) {
    int i = 0, end = 0;
    if (inside && abs(r - row) <= rows) {
      const float dv = fmaxf(fabsf(float(r - row)) - 0.5f, 0.0f);  // least vertical distance to a point of this row of cells
      const float half = sqrtf(fmaxf(reach * reach - dv * dv, 0.0f)) + 0.5f;
      const int cols = int(fminf(half, float(width)));
      const int* line = start + int64_t(r) * width;
      i = __ldg(line + max(col - cols, 0));
      end = __ldg(line + min(col + cols, width - 1) + 1);
    }
    while (__any_sync(kWarp, i < end)) {
      if (i < end) {
        const bool second = i + 1 < end;
        const float4 a = __ldg(records + i);
        const float4 b = __ldg(records + (second ? i + 1 : i));
        test(a);
        if (second) test(b);
        i += 2;
      }
      if (__any_sync(kWarp, queued > kQueue - 2)) insert_queued();
    }
  }
  insert_queued();
  if (!inside) return;

  const int64_t pixel = (int64_t(v) * height + row) * width + col;
  const float inverse = 1.0f / p.grid.weight_radius2;
  float transmittance = 1.0f, total = 0.0f;
  const bool empty = nearest.key[0] == kEmpty;
  const float depth = empty ? 0.0f : __uint_as_float(unsigned(nearest.key[0] >> 32));
#pragma unroll
  for (int k = 0; k < N; ++k) {
    const bool hit = nearest.key[k] != kEmpty;
    const int i = int(unsigned(nearest.key[k]));
    float d2 = -1.0f, share = 0.0f;
    if (hit && k < p.out.slots) {
      const float3 at = load_ndc<kWorld>(p.cloud, v, i);
      d2 = squared_distance(xf, yf, at.x, at.y);
      const float w = slot_weight(d2, p.grid.weight_radius2, inverse);
      share = w * transmittance;
      transmittance *= 1.0f - w;
      if (p.blend.norm) share = w;
      total += share;
    }
    if (k < p.out.slots) {
      const int64_t slot = pixel * p.out.slots + k;
      if (p.out.idx != nullptr) p.out.idx[slot] = hit ? v * p.cloud.count + i : -1;
      if (p.out.zbuf != nullptr) p.out.zbuf[slot] = hit ? __uint_as_float(unsigned(nearest.key[k] >> 32)) : -1.0f;
      if (p.out.dists2 != nullptr) p.out.dists2[slot] = d2;
    }
    // from here on the upper half of a key holds the slot's share of the colour
    if constexpr (kChannels > 0) nearest.key[k] = uint64_t(__float_as_uint(share)) << 32 | (hit ? unsigned(i) : 0u);
  }

  if constexpr (kChannels > 0) {
    const float scale = p.blend.norm ? 1.0f / fmaxf(total, 1e-4f) : 1.0f;
    p.depth[pixel] = depth;
    const int channels = kChannels == 3 ? 3 : p.blend.channels;
    float* image = p.image + pixel * channels;
    for (int c0 = 0; c0 < channels; c0 += kChannels) {
      float sum[kChannels] = {};
#pragma unroll
      for (int k = 0; k < N; ++k) {
        const float share = __uint_as_float(unsigned(nearest.key[k] >> 32));
        if (share == 0.0f) continue;
        unsigned i = unsigned(nearest.key[k]);
        if constexpr (N > 32) asm volatile("" : "+r"(i));  // else all addresses are computed before the loop, and registers spill
        const float* f = p.blend.features + int64_t(i) * channels + c0;
#pragma unroll
        for (int c = 0; c < kChannels; ++c) {
          if (c0 + c < channels) sum[c] += share * __ldg(f + c);
        }
      }
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        if (c0 + c < channels) {
          image[c0 + c] = empty && p.blend.background != nullptr ? p.blend.background[c0 + c] : sum[c] * scale;
        }
      }
    }
  }
}

template <int N>
void launch(const ForwardParams& p, cudaStream_t stream) {
  const dim3 grid((p.cloud.width + kTileX - 1) / kTileX, (p.cloud.height + kTileY - 1) / kTileY, p.cloud.views);
  if (p.image == nullptr) {
    if (p.cloud.cameras == nullptr) {
      raster_kernel<N, false, 0><<<grid, kThreads, 0, stream>>>(p);
    } else {
      raster_kernel<N, true, 0><<<grid, kThreads, 0, stream>>>(p);
    }
  } else if (p.blend.channels == 3) {
    raster_kernel<N, true, 3><<<grid, kThreads, 0, stream>>>(p);
  } else {
    raster_kernel<N, true, 4><<<grid, kThreads, 0, stream>>>(p);
  }
}

cudaError_t forward(ForwardParams& p, void* workspace, size_t bytes, cudaStream_t stream) {
  const RasterCloud& c = p.cloud;
  const size_t need = raster_workspace_bytes(c.views, c.count, c.height, c.width);
  if (need == 0 || bytes < need || p.out.slots < 1 || p.out.slots > kMaxSlots) return cudaErrorInvalidValue;
  p.grid = make_grid(c.height, c.width, c.radius);
  layout_bins(c.views, c.count, c.height, c.width, workspace, &p.bins);
  if (cudaError_t error = fill_bins(c, p.grid, p.bins, stream); error != cudaSuccess) return error;
  const int k = p.out.slots;
  if (k == 1) {
    launch<1>(p, stream);
  } else if (k <= 4) {
    launch<4>(p, stream);
  } else if (k <= 8) {
    launch<8>(p, stream);
  } else if (k <= 10) {
    launch<10>(p, stream);
  } else if (k <= 16) {
    launch<16>(p, stream);
  } else if (k <= 32) {
    launch<32>(p, stream);
  } else {
    launch<64>(p, stream);
  }
  return cudaGetLastError();
}

// One thread per pixel; blends fragments that lie in memory.
__global__ void __launch_bounds__(kThreads) composite_kernel(const int32_t* idx, const float* dists2, int64_t pixels, int slots,
                                                             RasterBlend blend, float radius2, float* image) {
  const int64_t pixel = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (pixel >= pixels) return;
  idx += pixel * slots;
  dists2 += pixel * slots;
  image += pixel * blend.channels;
  const float inverse = 1.0f / radius2;
  constexpr int kChannels = 4;
  for (int c0 = 0; c0 < blend.channels; c0 += kChannels) {
    float sum[kChannels] = {};
    float transmittance = 1.0f, total = 0.0f;
    for (int k = 0; k < slots; ++k) {
      if (idx[k] < 0) continue;
      const float w = slot_weight(dists2[k], radius2, inverse);
      const float share = blend.norm ? w : w * transmittance;
      transmittance *= 1.0f - w;
      total += w;
      const float* f = blend.features + int64_t(idx[k] % blend.rows) * blend.channels + c0;
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        if (c0 + c < blend.channels) sum[c] += share * __ldg(f + c);
      }
    }
    const float scale = blend.norm ? 1.0f / fmaxf(total, 1e-4f) : 1.0f;
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      if (c0 + c < blend.channels) {
        image[c0 + c] = idx[0] < 0 && blend.background != nullptr ? blend.background[c0 + c] : sum[c] * scale;
      }
    }
  }
}

}  // namespace

size_t raster_workspace_bytes(int views, int count, int height, int width) {
  // views index grid.y and grid.z, a view's cells and all packed point indices are 32-bit
  if (views < 1 || views > 65535 || count < 0 || height < 1 || width < 1) return 0;
  if (int64_t(height) * width >= INT32_MAX || int64_t(views) * count > INT32_MAX || height > 65535 * kTileY) return 0;
  return layout_bins(views, count, height, width, nullptr, nullptr);
}

cudaError_t raster_fragments(const RasterCloud& cloud, const RasterFragments& out, void* workspace, size_t bytes,
                             cudaStream_t stream) {
  ForwardParams p{};
  p.cloud = cloud;
  p.out = out;
  return forward(p, workspace, bytes, stream);
}

cudaError_t raster_render(const RasterCloud& cloud, const RasterBlend& blend, const RasterFragments& out, float* image,
                          float* depth, void* workspace, size_t bytes, cudaStream_t stream) {
  if (cloud.cameras == nullptr || blend.rows != cloud.count || blend.channels < 1) return cudaErrorInvalidValue;
  ForwardParams p{};
  p.cloud = cloud;
  p.out = out;
  p.blend = blend;
  p.image = image;
  p.depth = depth;
  return forward(p, workspace, bytes, stream);
}

cudaError_t raster_composite(const int32_t* idx, const float* dists2, int64_t pixels, int slots, const RasterBlend& blend,
                             double radius, float* image, cudaStream_t stream) {
  if (pixels == 0) return cudaSuccess;
  const unsigned blocks = unsigned((pixels + kThreads - 1) / kThreads);
  composite_kernel<<<blocks, kThreads, 0, stream>>>(idx, dists2, pixels, slots, blend, float(radius * radius), image);
  return cudaGetLastError();
}

}  // namespace fvgen
